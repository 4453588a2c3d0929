"""The interpreter on the emulator's faulty kernels, and its arithmetic compared with exact numbers."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from qcli.runtime import cuda, nvcc
from tests.ptx import machine
from tests.ptx.arithmetic import TYPES, function_of, to_bf16
from tests.ptx.backend import Interpreter
from tests.ptx.lanes import Fault
from tests.ptx.parse import PtxError

WITH_NVCC = pytest.mark.skipif(nvcc.find() is None, reason="needs nvcc")
FAULTY = Path(__file__).parents[1] / "emulator"


@pytest.fixture(scope="module")
def interpreter(compiled):
    with Interpreter(compiled, sources=FAULTY).running() as made:
        yield made


def run(entry: str, *arguments, signature="p", threads=64, shared=0, grid=1):
    cuda.kernel("faulty", signature, entry)((), (grid,), threads, shared, *arguments)
    return arguments[-1]


@WITH_NVCC
def test_what_is_right(interpreter):
    assert torch.equal(run("with_barrier", torch.zeros(64)), torch.arange(1, 65).float() % 64)
    expected = torch.arange(64) * 4.0
    expected[3] = 0
    assert torch.equal(run("waited_for", torch.arange(256.0), torch.zeros(64), signature="pp", shared=1024), expected)


@WITH_NVCC
@pytest.mark.parametrize(
    "entry, options, message",
    [
        ("divergent", {}, "divergent barrier: 40 of 64 threads of a block wait here, 24 have returned"),
        ("two_barriers", {}, "divergent barrier: 32 of 64 threads of a block wait here, 0 have returned"),
        ("divergent_shuffle", {}, "divergent barrier: 16 of 32 threads of a warp wait here, 16 have returned"),
        ("part_of_a_warp", {}, "with mask 0000ffff, expected all 32 lanes"),
        ("unset_shared", {"shared": 256}, "which nobody has written"),
        ("not_waited_for", {"shared": 1024, "signature": "pp"}, "asynchronous copy that nobody has waited for"),
        ("no_barrier", {}, "touches without a barrier between"),
        ("writes_too_soon", {}, "a write of 4 bytes at byte \\d+ of .*touches without a barrier between"),
        ("copies_too_soon", {"shared": 1024, "signature": "pp"}, "a copy of 16 bytes .*touches without a barrier between"),
        ("beyond_dynamic", {"shared": 256}, "thread 63: a write of 4 bytes at byte 256 of values_bytes"),
        ("beyond_static", {}, "a write of 4 bytes at byte 128 of "),
        ("misaligned", {"signature": "pp"}, "no multiple of 16"),
        ("with_barrier", {"signature": "pp"}, "packs 16 bytes of arguments, the kernel takes 8"),
        ("with_barrier", {"threads": 40}, "expected whole warps"),
        ("with_barrier", {"grid": 0}, "a grid of \\(0, 1, 1\\)"),
        ("with_barrier", {"shared": 232448 - 255}, "bytes of shared memory, a block has 232448"),
    ],
)
def test_faults(entry, options, message, interpreter):
    tensors = [torch.zeros(512)] * options.get("signature", "p").count("p")
    with pytest.raises(Fault, match=message):
        run(entry, *tensors, **options)


@WITH_NVCC
def test_a_kernel_without_an_end(interpreter, monkeypatch):
    monkeypatch.setattr(machine, "MOST_STEPS", 10)
    with pytest.raises(Fault, match="no end after 10 instructions"):
        run("with_barrier", torch.zeros(64))


@WITH_NVCC
def test_beyond_a_tensor(interpreter):
    """The end of the tensor is the limit, not that of its storage."""
    out = torch.zeros(128)
    with pytest.raises(Fault, match="thread 0: a write of 4 bytes at byte 256 of an array of 256: outside of all"):
        cuda.kernel("faulty", "pi", "beyond_global")((), (1,), 64, 0, out[:64], 64)
    cuda.kernel("faulty", "pi", "beyond_global")((), (1,), 64, 0, out[:64], 63)
    assert torch.equal(out[:64], torch.ones(64))


@WITH_NVCC
def test_tensor_core_products(interpreter):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=generator).half() for n in (16, 8))
    out = run("one_product", a, b, torch.zeros(16, 8), signature="ppp", threads=32)
    torch.testing.assert_close(out, a.float() @ b.float().t(), rtol=1e-6, atol=1e-6)
    a, b = (torch.randint(-128, 128, (n, 32), generator=generator, dtype=torch.int8) for n in (16, 8))
    out = run("one_integer_product", a, b, torch.zeros(16, 8, dtype=torch.int32), signature="ppp", threads=32, shared=24 * 32)
    assert torch.equal(out, a.int() @ b.int().t())


def call(opcode: str, *values):
    """The result of the instruction for numbers, each in the type of the opcode."""
    types, _, function = function_of(tuple(opcode.split(".")))
    with np.errstate(all="ignore"):
        return function(*(np.array([value], TYPES[kind]) for value, kind in zip(values, types, strict=True)))[0]


def rounded(exact: Fraction, digits: int, down: bool = False) -> Fraction:
    """Rounds to that many binary digits: to the nearest, ties to even, or down. For values far from the ends of the range."""
    if exact == 0:
        return exact
    scale = Fraction(2) ** (digits - 1)
    size = abs(exact)
    while size >= 2:
        size, scale = size / 2, scale / 2
    while size < 1:
        size, scale = size * 2, scale * 2
    return (exact * scale).__floor__() / scale if down else round(exact * scale) / scale


def test_fused_products_are_rounded_once():
    generator = np.random.default_rng(0)
    for _ in range(300):
        a, b = (np.float32(v) for v in generator.standard_normal(2))
        c = np.float32(-a * b * generator.choice([1, 1 + 2**-20, 2**-25, 2**25]))
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        assert Fraction(float(call("fma.rn.f32", a, b, c))) == rounded(exact, 24)
        assert Fraction(float(call("fma.rm.f32", a, b, c))) == rounded(exact, 24, down=True)
    # Slightly more than half a unit: rounding to float64 first would lose the difference.
    a, c = np.float32(1 + 2**-12), np.float32(2**-60)
    assert call("fma.rn.f32", a, a, c) == np.float32(1 + 2**-11 + 2**-23)


def test_bfloat16_is_the_nearest():
    generator = np.random.default_rng(0)
    values = generator.standard_normal(300).astype(np.float32)
    values[:2] = 1 + 2**-8, 1 + 3 * 2**-8  # ties
    for value, bits in zip(values, to_bf16(values)):
        back = (np.array([bits], np.uint32) << 16).view(np.float32)[0]
        assert Fraction(float(back)) == rounded(Fraction(float(value)), 8)
    special = np.array([np.nan, np.inf, -np.inf, 3.4e38, -0.0], np.float32)
    assert to_bf16(special).tolist() == [0x7FFF, 0x7F80, 0xFF80, 0x7F80, 0x8000]


@pytest.mark.parametrize(
    "opcode, values, expected",
    [
        ("prmt.b32", (0x33221100, 0x77665544, 0x7610), 0x77661100),
        ("prmt.b32", (0x80, 0, 0x0008), 0x808080FF),  # byte 0 by its sign, then bytes 0 itself
        ("bfe.s32", (0x0000F800, 8, 8), -8),
        ("bfe.s32", (-8, 30, 8), -1),
        ("bfe.s32", (-1, 3, 0), 0),
        ("bfe.u32", (0x80000080, 4, 4), 8),
        ("bfe.u32", (0x80000080, 28, 8), 8),
        ("bfi.b32", (0b101, 0xFFFF0000, 4, 3), 0xFFFF0050),
        ("bfi.b32", (1, 0, 32, 1), 0),
        ("brev.b32", (1,), 1 << 31),
        ("popc.b32", (0xF0F0,), 8),
        ("bfind.shiftamt.u32", (1 << 30,), 1),
        ("bfind.shiftamt.u32", (0,), 0xFFFFFFFF),
        ("shl.b32", (1, 32), 0),
        ("shr.s32", (-8, 99), -1),
        ("shr.u32", (8, 2), 2),
        ("div.s32", (-7, 2), -3),
        ("rem.s64", (-7, 2), -1),
        ("mul.wide.s32", (-(2**31), 2), -(2**32)),
        ("mul.hi.s64", (-(2**62), 12), -3),
        ("mul.hi.u32", (2**31, 6), 3),
        ("mad.lo.s32", (7, 6, -2), 40),
        ("cvt.rni.s32.f32", (2.5,), 2),
        ("cvt.rni.s32.f32", (3e10,), 2**31 - 1),
        ("cvt.rni.s32.f32", (float("nan"),), 0),
        ("cvt.s16.s8", (-3,), -3),
        ("max.f32", (float("nan"), 1.0), 1.0),
        ("setp.neu.f32", (float("nan"), 1.0), True),
        ("setp.ne.f32", (float("nan"), 1.0), False),
        ("setp.gtu.f32", (0.0, 1.0), False),
        ("cvt.rn.f16x2.f32", (2.0, 1.0), 0x40003C00),
        ("sub.bf16x2", (0x43004380, 0x43004300), 0x00004300),
        ("fma.rn.bf16x2", (0x43004380, 0xBF80BF80, 0x43004300), 0x0000C300),
        ("mul.bf16x2", (0x00010010, 0x77807780), 0x35003700),  # subnormals times 2^112
        ("mul.rn.bf16x2", (0x3F81BF81, 0x3F81C000), 0x3F824001),
        ("mul.f16x2", (0x3C010001, 0x3C013800), 0x3C020000),
    ],
)
def test_arithmetic(opcode, values, expected):
    assert call(opcode, *values) == expected


def test_signs_of_zero():
    assert np.signbit(call("min.f32", 0.0, -0.0)) and not np.signbit(call("max.f32", -0.0, 0.0))


@pytest.mark.parametrize("opcode", ["add.sat.s32", "mul.rz.f32", "sin.approx.f32", "cvt.rz.f16.f32", "fma.rn.ftz.f32"])
def test_an_unknown_instruction_is_refused(opcode):
    with pytest.raises(PtxError, match=f"does not know {opcode}"):
        function_of(tuple(opcode.split(".")))
