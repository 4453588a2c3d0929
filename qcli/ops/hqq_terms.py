"""What an iteration of HQQ (qcli/methods/hqq.py) takes means of, where no error is large enough to be moved.

With 1 / scale and the zero point of each group: code = clamp(round(w / scale + zero)) in [0, 2^b - 1]; the error of an element is
w - (code - zero) scale, and its term of the next zero point code - w / scale.
"""

import torch

from qcli.ops._library import define
from qcli.runtime import cpu

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _reference(x: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, bits: int) -> _Results:
    _check(x, inverse, zero)
    wide = x.float()
    scaled = wide * inverse
    codes = (scaled + zero).round_().clamp_(0, 2**bits - 1)
    magnitudes = (wide - (codes - zero) / inverse).abs_()
    return codes - scaled, magnitudes, magnitudes.amax(-1, keepdim=True)


def _fake(x, inverse, zero, bits):
    terms = x.new_empty(x.shape, dtype=torch.float32)
    return terms, torch.empty_like(terms), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _check(x, inverse, zero):
    cpu.dtype_code("hqq_terms", x)
    for name, each in (("inverse", inverse), ("zero", zero)):
        if each.shape != (*x.shape[:-1], 1) or each.dtype != torch.float32:
            raise ValueError(f"hqq_terms: {name} is {each.dtype} {tuple(each.shape)}, expected torch.float32 {(*x.shape[:-1], 1)}")


_kernel = cpu.kernel("hqq_terms", "piqqfppppp")


def _cpu(x: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, bits: int) -> _Results:
    _check(x, inverse, zero)
    x = x.contiguous()
    terms, magnitudes, largest = _fake(x, inverse, zero, bits)
    tables = inverse.contiguous(), zero.contiguous(), terms, magnitudes, largest
    _kernel(x, cpu.DTYPES[x.dtype], largest.numel(), x.shape[-1], float(2**bits - 1), *tables)
    return terms, magnitudes, largest


_op = define("hqq_terms(Tensor x, Tensor inverse, Tensor zero, int bits) -> (Tensor, Tensor, Tensor)", _reference, _fake, _cpu)


def hqq_terms(x: torch.Tensor, inverse: torch.Tensor, zero: torch.Tensor, bits: int) -> _Results:
    """x [..., size], float32, bfloat16 or float16; inverse and zero float32 [..., 1], for codes of `bits` bits.

    Returns the terms of the zero points float32 [..., size], the magnitudes of the errors float32 [..., size], and the largest of
    each group, float32 [..., 1]. Where that is not a finite number, terms are not defined. Raises ValueError or TypeError.
    """
    return _op(x, inverse, zero, bits)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 8):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for shape in ((3, 4, 64), (5, 70), (300, 128), (0, 32)):
                x = torch.randn(shape, generator=generator).to(dtype)
                inverse = (torch.rand((*shape[:-1], 1), generator=generator) + 0.2) * (2**bits - 1) / 4
                zero = torch.rand((*shape[:-1], 1), generator=generator) * (2**bits - 1)
                yield (
                    f"{bits}-{str(dtype)[6:]}-{'x'.join(map(str, shape))}",
                    {"x": x, "inverse": inverse, "zero": zero, "bits": bits},
                )
