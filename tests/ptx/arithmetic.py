"""The functions of all arithmetic instructions, over arrays with one element per thread.

`function_of(opcode)` gives (types of the operands, type of the result, function). Rounding is the ISA's, bit by bit. The exception
is fma.rn.f64, which may be wrong in the last place by a 2000th of its unit.
"""

import operator
from collections.abc import Callable

import numpy as np

from tests.ptx.parse import PtxError

TYPES = {
    "u8": np.uint8,
    "u16": np.uint16,
    "u32": np.uint32,
    "u64": np.uint64,
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "b8": np.uint8,
    "b16": np.uint16,
    "b32": np.uint32,
    "b64": np.uint64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
    "bf16": np.uint16,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
}
_WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_COMPARE = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}

Function = tuple[list[str], str, Callable]


def function_of(opcode: tuple[str, ...]) -> Function:
    """See the module. Raises PtxError for an unknown instruction."""
    name, kinds = opcode[0], [part for part in opcode[1:] if part in TYPES]
    modes = [part for part in opcode[1:] if part not in TYPES]
    maker = _MAKERS.get(name)
    found = maker(kinds, modes) if maker else None
    if found is None:
        raise PtxError(f"the interpreter does not know {'.'.join(opcode)}")
    return found


def is_float(kind: str) -> bool:
    """Whether numpy has this float type."""
    return kind in ("f16", "f32", "f64")


def to_bf16(value: np.ndarray) -> np.ndarray:
    """float32 to the bits of the nearest bfloat16, ties to even."""
    bits = value.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """To float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def halves(kind: str, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high value of a register with two values, as float32."""
    parts = (bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)
    return tuple(from_bf16(p) if kind == "bf16x2" else p.view(np.float16).astype(np.float32) for p in parts)


def packed(kind: str, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two float32 values, rounded and packed into a register."""
    parts = (to_bf16(p) if kind == "bf16x2" else p.astype(np.float16).view(np.uint16) for p in (low, high))
    low, high = (part.astype(np.uint32) for part in parts)
    return low | high << 16


def _to_odd(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """A float64 whose sum with `error` is exact, rounded to odd. Rounding the result again is then the same as rounding once."""
    even = (value.view(np.uint64) & 1) == 0
    toward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even & np.isfinite(value), np.nextafter(value, toward), value)


def _exact_fma(a, b, c) -> np.ndarray:
    """a b + c of float32 in float64, rounded to odd. Knuth's TwoSum gives the rounding error of the addition."""
    product, c = a.astype(np.float64) * b.astype(np.float64), np.asarray(c).astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    return _to_odd(total, np.where(np.isfinite(total), error, 0.0))


def _to_f32(value: np.ndarray, mode: str) -> np.ndarray:
    """float64, rounded to odd if it is not exact, to float32: to the nearest, or down."""
    nearest = value.astype(np.float32)
    if mode == "rm":
        return np.where(nearest > value, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return nearest


def _fma(kinds, modes):
    kind, mode = kinds[0], modes[0]
    if kind == "f32" and mode in ("rn", "rm") and len(modes) == 1:
        return [kind] * 3, kind, lambda a, b, c: _to_f32(_exact_fma(*np.broadcast_arrays(a, b, c)), mode)
    if kind == "f64" and modes == ["rn"]:
        wide = np.longdouble
        return [kind] * 3, kind, lambda a, b, c: (wide(a) * wide(b) + wide(c)).astype(np.float64)
    if kind in ("f16x2", "bf16x2") and modes == ["rn"]:

        def both(a, b, c):
            parts = zip(*(halves(kind, np.atleast_1d(value)) for value in (a, b, c)))
            # A product of 11 bits is exact in float32. The sum is exact in float64, apart from far less than half a unit.
            return packed(kind, *(_odd_f32(_exact_fma(*np.broadcast_arrays(*part))) for part in parts))

        return [kind] * 3, kind, both
    return None


def _odd_f32(value: np.ndarray) -> np.ndarray:
    """float64 to float32, rounded to odd."""
    nearest = value.astype(np.float32)
    down = np.where(np.abs(nearest) > np.abs(value), np.nextafter(nearest, np.float32(0)), nearest)
    bits = down.view(np.uint32) | (down != value)
    return np.where(np.isfinite(value), bits.view(np.float32), nearest)


def _sum(function):
    def make(kinds, modes):
        kind = kinds[0]
        if kind in ("f16x2", "bf16x2"):
            return [kind] * 2, kind, lambda a, b: packed(kind, *map(function, halves(kind, a), halves(kind, b)))
        allowed = [[], ["rn"]] if is_float(kind) else [[]]
        return ([kind] * 2, kind, function) if modes in allowed else None

    return make


def _product(a, b, kind):
    wide = TYPES[_WIDE[kind]]
    return np.asarray(a).astype(wide) * np.asarray(b).astype(wide)


def _rounded_once(a, b) -> np.ndarray:
    """A product of two 16-bit values in float32, rounded to odd where that is too narrow for it."""
    return _odd_f32(np.asarray(a).astype(np.float64) * np.asarray(b).astype(np.float64))


def _mul(kinds, modes):
    kind = kinds[0]
    if kind in ("f16x2", "bf16x2") and modes in ([], ["rn"]):
        return [kind] * 2, kind, lambda a, b: packed(kind, *map(_rounded_once, halves(kind, a), halves(kind, b)))
    if is_float(kind):
        return ([kind] * 2, kind, operator.mul) if modes in ([], ["rn"]) else None
    if modes == ["lo"]:
        return [kind] * 2, kind, operator.mul
    if modes == ["wide"]:
        return [kind] * 2, _WIDE[kind], lambda a, b: _product(a, b, kind)
    if modes == ["hi"]:
        bits = 8 * TYPES[kind]().itemsize
        return [kind] * 2, kind, lambda a, b: (np.asarray(a).astype(object) * np.asarray(b) >> bits).astype(TYPES[kind])
    return None


def _mad(kinds, modes):
    types, result, multiply = _mul(kinds, modes)
    return [*types, result], result, lambda a, b, c: multiply(a, b) + c


def _div(kinds, modes):
    kind = kinds[0]
    if is_float(kind):
        return ([kind] * 2, kind, operator.truediv) if modes == ["rn"] else None
    return [kind] * 2, kind, _quotient


def _quotient(a, b):
    """Division towards zero. Inactive threads may divide by zero."""
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(quotient.dtype)


def _rem(kinds, modes):
    return kinds * 2, kinds[0], lambda a, b: a - _quotient(a, b) * np.where(b == 0, b.dtype.type(1), b)


def _extreme(numbers, of_zeros):
    def make(kinds, modes):
        kind = kinds[0]
        if not is_float(kind):
            return kinds * 2, kind, np.minimum if numbers is np.fmin else np.maximum

        def function(a, b):  # of a NaN and a number: the number; -0 is below +0
            a, b = np.broadcast_arrays(a, b)
            bits = TYPES["b32" if kind == "f32" else "b64"]
            zeros = of_zeros(a.copy().view(bits), b.copy().view(bits)).view(TYPES[kind])
            return np.where((a == 0) & (b == 0), zeros, numbers(a, b))

        return (kinds * 2, kind, function) if not modes and kind != "f16" else None

    return make


def _shift(function):
    def make(kinds, modes):
        kind, bits = kinds[0], 8 * TYPES[kinds[0]]().itemsize

        def shifted(a, by):
            inside = np.minimum(by, bits - 1).astype(TYPES[kind])
            if kind[0] == "s":
                return function(a, inside)
            return np.where(by >= bits, TYPES[kind](0), function(a, inside))

        return [kind, "u32"], kind, shifted

    return make


def _setp(kinds, modes):
    kind, (test, *more) = kinds[0], modes
    if more:
        return None
    if test in ("nan", "num"):
        either = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
        return [kind] * 2, "pred", either if test == "nan" else lambda a, b: ~either(a, b)
    if is_float(kind) and test[-1] == "u" and test[:-1] in _COMPARE:
        ordered = _COMPARE[test[:-1]]
        return [kind] * 2, "pred", lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if is_float(kind) and test == "ne":
        return [kind] * 2, "pred", lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)
    return [kind] * 2, "pred", _COMPARE[test]


def _cvt(kinds, modes):
    to, source = kinds
    if to in ("f16x2", "bf16x2") and modes == ["rn"]:  # the first operand becomes the high half
        return [source] * 2, to, lambda high, low: packed(to, *np.broadcast_arrays(low, high))
    if to == "bf16" and source == "f32" and modes == ["rn"]:
        return [source], to, to_bf16
    if source == "bf16":
        return ([source], to, from_bf16) if to == "f32" and not modes else None
    if is_float(source) and not is_float(to):
        rounding = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}.get(modes[0])
        limits = np.iinfo(TYPES[to])

        def to_integer(value):
            value = rounding(value.astype(np.float64))
            inside = np.clip(np.where(np.isnan(value), 0, value), float(limits.min), float(limits.max))
            return np.where(value >= limits.max, limits.max, inside.astype(TYPES[to]))

        return ([source], to, to_integer) if rounding and modes[1:] == [] else None
    if is_float(to) and modes not in ([], ["rn"]):
        return None
    return ([source], to, lambda value: value.astype(TYPES[to])) if not modes or is_float(to) else None


def _bits32(function, operands: int, result: str = "b32"):
    return lambda kinds, modes: (["b32"] * operands, result, function)


def _spread(value: np.ndarray) -> np.ndarray:
    """The bits of 32-bit integers, the lowest first: [..., 32]."""
    return value[..., None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)


def _gather(bits: np.ndarray) -> np.ndarray:
    return (bits << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def _bfind(kinds, modes):
    if kinds != ["u32"] or modes != ["shiftamt"]:
        return None
    top = lambda v: 31 - _spread(v)[..., ::-1].argmax(-1)  # noqa: E731
    return kinds, "u32", lambda v: np.where(v == 0, np.uint32(0xFFFFFFFF), (31 - top(v)).astype(np.uint32))


def _bfe(kinds, modes):
    """`length` bits from `position` on, extended by the last bit or by zeros."""
    kind = kinds[0]
    if kinds not in (["u32"], ["s32"]):
        return None
    wide = np.int64 if kind == "s32" else np.uint64

    def function(a, position, length):
        position, length = (np.minimum(np.asarray(v) & 0xFF, 32).astype(wide) for v in (position, length))
        rest = wide(64) - length
        kept = np.where(length == 0, wide(0), np.asarray(a).astype(wide) >> position << np.minimum(rest, wide(63)))
        return (kept >> np.minimum(rest, wide(63))).astype(TYPES[kind])

    return [kind, "u32", "u32"], kind, function


def _bfi(a, b, position, length):
    """b, with the lowest `length` bits of a inserted from `position` on."""
    bits = np.uint64(32)
    position, length = (np.minimum(np.asarray(v).astype(np.uint64) & np.uint64(0xFF), bits) for v in (position, length))
    mask = ((np.uint64(1) << length) - np.uint64(1)) << position
    inserted = np.asarray(a).astype(np.uint64) << position
    return ((np.asarray(b).astype(np.uint64) & ~mask) | (inserted & mask)).astype(np.uint32)


def _prmt(a, b, selector):
    """Each of four bytes is one of the eight bytes of b and a, or the sign of one."""
    eight = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        choice = np.asarray(selector) >> np.uint32(4 * i) & np.uint32(15)
        byte = (eight >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32)
        sign = np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0))
        result = result | np.where(choice & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return result


def _same(function):
    return lambda kinds, modes: (kinds, kinds[0], function)


def _logic(function):
    return lambda kinds, modes: (kinds * 2, kinds[0], function)


_MAKERS = {
    "abs": _same(np.abs),
    "add": _sum(operator.add),
    "and": _logic(operator.and_),
    "bfe": _bfe,
    "bfi": _bits32(_bfi, 4),
    "bfind": _bfind,
    "brev": _bits32(lambda v: _gather(_spread(v)[..., ::-1]), 1),
    "cvt": _cvt,
    "div": _div,
    "fma": _fma,
    "mad": _mad,
    "max": _extreme(np.fmax, operator.and_),
    "min": _extreme(np.fmin, operator.or_),
    "mul": _mul,
    "neg": _same(operator.neg),
    "not": _same(operator.invert),
    "or": _logic(operator.or_),
    "popc": _bits32(lambda v: _spread(v).sum(-1, dtype=np.uint32), 1),
    "prmt": lambda kinds, modes: None if modes else (["b32"] * 3, "b32", _prmt),
    "rcp": lambda kinds, modes: (kinds, kinds[0], lambda v: TYPES[kinds[0]](1) / v) if modes == ["rn"] else None,
    "rem": _rem,
    "selp": lambda kinds, modes: ([*kinds, *kinds, "pred"], kinds[0], lambda a, b, p: np.where(p, a, b)),
    "setp": _setp,
    "shl": _shift(operator.lshift),
    "shr": _shift(operator.rshift),
    "sqrt": lambda kinds, modes: (kinds, kinds[0], np.sqrt) if modes == ["rn"] else None,
    "sub": _sum(operator.sub),
    "xor": _logic(operator.xor),
}
