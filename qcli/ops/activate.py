"""The activation between two products: y = act(gate) * up, or act(gate) without up. It is float32, and rounded once.

silu        x sigmoid(x)                                                      (Elfwing, Uchibe and Doya, 2017)
gelu        x (1 + erf(x / sqrt 2)) / 2                                       (Hendrycks and Gimpel, 2016)
gelu_tanh   x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2                 (the same)
relu        max(x, 0)
relu2       max(x, 0)^2                                                       (So et al., 2021)
quick_gelu  x sigmoid(1.702 x)                                                (Hendrycks and Gimpel, 2016)
"""

import torch

from qcli.ops._library import blocks, define
from qcli.ops._step import token_rows, token_stride
from qcli.runtime import cpu, cuda

# In the order of `Kind` in the kernels.
KINDS = {
    "silu": torch.nn.functional.silu,
    # torch's own float32 gelu is a polynomial where there is AVX-512: 7e-7 off, and NaN at infinity.
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "relu2": lambda x: torch.nn.functional.relu(x).square(),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
_CODES = {kind: code for code, kind in enumerate(KINDS)}


def _code(kind: str) -> int:
    if kind not in KINDS:
        raise ValueError(f"activate: kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return _CODES[kind]


def _reference(gate, up, kind):
    _code(kind)
    y = KINDS[kind](gate.float().contiguous())
    return (y if up is None else y * up.float()).to(gate.dtype)


def _fake(gate, up, kind):
    return gate.new_empty(gate.shape)


_kernel = cpu.kernel("activate", "pqq")


def record(gate: torch.Tensor, up: torch.Tensor | None, y: torch.Tensor, kind: str) -> cpu.Record:
    """The record of the CPU kernel: struct Activate of kernels/cpu/activate.cpp.

    gate, up and y float32 [tokens, n], with a stride between tokens; up may be None, and y may be gate or up. Raises TypeError or
    ValueError.
    """
    op, n = "activate", gate.shape[-1]
    strides = [0 if x is None else token_stride(op, name, x, n) for name, x in (("gate", gate), ("up", up), ("y", y))]
    return cpu.Record("pppqqqqi", gate, up, y, *strides, n, _code(kind))


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 and token_rows(x) else x.contiguous().view(-1, x.shape[-1])


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """[tokens, n] in float32, with the elements of a token side by side."""
    if x is None:
        return None
    return _in_rows(x.float())


def _cpu(gate, up, kind):
    if not gate.numel():
        return _reference(gate, up, kind)
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"activate: up is {list(up.shape)}, expected {list(gate.shape)}")
    rows, y = _rows(gate), cpu.empty((gate.shape[:-1].numel(), gate.shape[-1]), torch.float32)
    made = record(rows, _rows(up), y, kind)
    _kernel(made.address, len(rows), 0)
    return y.to(gate.dtype).view(gate.shape)


_MANY = 1 << 20  # values from which a thread of the CUDA kernel takes eight
_kernel_cuda = cuda.kernel("activate", "pqpqqip")


def _cuda(gate, up, kind):
    _code(kind)
    if not gate.numel():
        return _reference(gate, up, kind)
    constants = (f"DTYPE={cuda.type_name('activate', gate)}", f"KIND={kind.upper()}")
    rows, y = _in_rows(gate), gate.new_empty(gate.shape)
    if up is not None:
        if up.dtype != gate.dtype or up.shape != gate.shape or up.device != gate.device:
            found, wanted = (f"{x.dtype} {list(x.shape)} on {x.device}" for x in (up, gate))
            raise ValueError(f"activate: up is {found}, expected {wanted}")
        up = _in_rows(up)
    tokens, n = rows.shape
    places = [x.data_ptr() // x.element_size() for x in (rows, up, y) if x is not None]
    strides = rows.stride(0), 0 if up is None else up.stride(0)
    eight = gate.numel() >= _MANY and not any(number % 8 for number in (n, *strides, *places))
    grid = (blocks(n, 256 * (8 if eight else 1)), tokens)
    _kernel_cuda(constants, grid, 256, 0, rows, strides[0], 0 if up is None else up, strides[1], n, eight, y)
    return y


_op = define("activate(Tensor gate, Tensor? up, str kind) -> Tensor", _reference, _fake, _cpu, _cuda)


def activate(gate: torch.Tensor, up: torch.Tensor | None, kind: str) -> torch.Tensor:
    """gate [..., n], float32, bfloat16 or float16; up of the same shape or None; kind of KINDS. Returns gate's shape and dtype.

    Raises ValueError for another kind, and for an up of another shape.
    """
    return _op(gate, up, kind)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in KINDS:
            for shape, gated in (((1, 1536), True), ((3, 2, 77), False), ((2, 4500), True)):
                gate, up = (4 * torch.randn(shape, generator=generator) for _ in range(2))
                name = f"{str(dtype)[6:]}-{kind}-{'x'.join(map(str, shape))}"
                yield name, {"gate": gate.to(dtype), "up": up.to(dtype) if gated else None, "kind": kind}
