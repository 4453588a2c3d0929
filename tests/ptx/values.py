"""Reading operands and writing results: arithmetic, moves, addresses."""

from collections.abc import Callable

import numpy as np

from tests.ptx.arithmetic import TYPES, function_of
from tests.ptx.lanes import UNSIGNED
from tests.ptx.parse import Address, Immediate, Instruction, Name, PtxError, Register

SHARED_WINDOW = 1 << 56  # the start of shared memory among generic addresses

Read = Callable[["Machine"], np.ndarray]  # noqa: F821
Step = Callable[["Machine", int], int | None]  # noqa: F821  runs at a place; gives the next, None where lanes part or wait


def reader(operand, kind: str) -> Read:
    """A function that gives an operand's values in that type. Of a wider register it takes the low part."""
    dtype = np.dtype(TYPES[kind])
    bits = 1 if kind == "pred" else 8 * dtype.itemsize
    if isinstance(operand, Register):
        number = operand.number
        if operand.bits == bits:
            return lambda m: m.registers[number].view(dtype)
        if operand.bits < bits:
            raise PtxError(f"a register of {operand.bits} bits, read as {kind}")
        return lambda m: m.registers[number].astype(UNSIGNED[bits]).view(dtype)
    if isinstance(operand, Immediate):
        value = np.array(operand.value & ((1 << bits) - 1), UNSIGNED[bits]).view(dtype)
        return lambda m: value
    if isinstance(operand, Name):
        return lambda m: _named(m, operand.name).astype(dtype)
    raise PtxError(f"an operand {operand} where a value is expected")


def _named(m, name: str) -> np.ndarray:
    """A special register, or the address of a variable or a parameter in its own state space."""
    if name in m.special:
        return m.special[name]
    if name in m.shared.address:
        return np.array(m.shared.address[name], np.uint64)
    if name in m.function.arguments:
        return np.array(m.function.arguments[name][0], np.uint64)
    raise PtxError(f"the interpreter does not know {name}")


def addresses(operand: Address) -> Read:
    """A function that gives the addresses uint64 [lanes] of an operand [base + offset]."""
    base = operand.base
    bits = base.bits if isinstance(base, Register) else 64
    read, offset, wrap = reader(base, f"u{bits}"), np.uint64(operand.offset & (1 << 64) - 1), np.uint64((1 << bits) - 1)
    return lambda m: np.broadcast_to((read(m).astype(np.uint64) + offset) & wrap, m.count)


def as_register(values: np.ndarray, register: Register) -> np.ndarray:
    """Values in the type of the register. Narrower values are extended by their sign, or by zeros."""
    target = np.dtype(UNSIGNED[register.bits])
    if values.dtype.itemsize != target.itemsize:
        values = values.astype(f"{values.dtype.kind}{target.itemsize}")
    return values.view(target)


def arithmetic(instruction: Instruction) -> Step:
    """The step of an instruction in arithmetic.py."""
    types, result, function = function_of(instruction.opcode)
    target, *sources = instruction.operands
    if len(sources) != len(types):
        raise PtxError(f"{instruction.text}: {len(sources)} operands, expected {len(types)}")
    readers, dtype = [reader(operand, kind) for operand, kind in zip(sources, types)], TYPES[result]

    def step(m, place: int) -> int:
        values = np.asarray(function(*(read(m) for read in readers))).astype(dtype, copy=False)
        m.write(target, as_register(values, target), instruction)
        return place + 1

    return step


def mov(instruction: Instruction) -> Step:
    """mov: copies a register, splits one into a vector, or joins a vector into one."""
    target, source = instruction.operands
    kind = instruction.opcode[-1]
    if isinstance(target, tuple):
        read = reader(source, kind)

        def apart(m, place: int) -> int:
            words = np.broadcast_to(read(m), m.count).copy().view(UNSIGNED[target[0].bits]).reshape(m.count, -1)
            for i, part in enumerate(target):
                m.write(part, words[:, i].copy(), instruction)
            return place + 1

        return apart
    if isinstance(source, tuple):
        readers = [reader(operand, f"b{target.bits // len(source)}") for operand in source]

        def together(m, place: int) -> int:
            words = np.stack([np.broadcast_to(read(m), m.count) for read in readers], 1)
            m.write(target, words.view(UNSIGNED[target.bits])[:, 0].copy(), instruction)
            return place + 1

        return together
    read = reader(source, kind)

    def step(m, place: int) -> int:
        m.write(target, as_register(read(m), target), instruction)
        return place + 1

    return step


def cvta(instruction: Instruction) -> Step:
    """cvta: converts generic addresses. Those of global memory stay the same, those of shared memory are in a window."""
    opcode, (target, source) = instruction.opcode, instruction.operands
    if opcode[-2] not in ("global", "shared"):
        raise PtxError(f"the interpreter does not know {'.'.join(opcode)}")
    read, shift = reader(source, opcode[-1]), np.uint64(SHARED_WINDOW if opcode[-2] == "shared" else 0)

    def step(m, place: int) -> int:
        m.write(target, as_register(read(m) - shift if "to" in opcode else read(m) + shift, target), instruction)
        return place + 1

    return step
