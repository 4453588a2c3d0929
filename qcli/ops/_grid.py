"""What ops that round to a grid share: the nearest codes under scales, and what kernels are told of a grid.

What a code stands for, in units of its scale, is its entry:
  integers     code - zero_point, with codes in [-2^(b-1), 2^(b-1) - 1], the one nearest to w / scale, halves to even
  nf4, fp4, nf3  a value of the codebook, by the thresholds between them
  e4m3, e2m1   a small float, the nearest one, halves to even
A NaN has the code of 0.
"""

from functools import cache

import numpy as np
import torch

from qcli import codebooks
from qcli.ops.fit_scale import ranked
from qcli.ops.round_floats import e2m1_codes, to_e4m3
from qcli.runtime import cpu
from qcli.runtime.arguments import table

TABLES = ("nf4", "fp4", "nf3")  # codebooks that thresholds divide
FORMS = ("", "table", "e4m3", "e2m1")  # by their numbers in the kernel
_TINY = 2.0**-126


def round_entries(v: torch.Tensor, zero: torch.Tensor | None, codebook: str, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest codes of values v float32 in units of their scales, and their entries, float32. `zero` float32 has the zero
    points of integers of `bits` bits, whose codebook is "". Codes are int8 for integers, uint8 for codebooks, and float8 for
    E4M3."""
    if codebook == "e4m3":
        codes = to_e4m3(v)
        return codes, codes.float()
    if codebook == "e2m1":
        codes = e2m1_codes(v)
        return codes, table(codebooks.E2M1, v.device)[codes.int()]
    v = v.nan_to_num(0.0, torch.inf, -torch.inf)
    if codebook:
        thresholds, values = ranked(codebook)
        ranks = torch.bucketize(v, table(thresholds, v.device), out_int32=True)
        return table(_order(codebook), v.device)[ranks], table(values, v.device)[ranks]
    most = 2 ** (bits - 1) - 1
    codes = (v.round() + (0.0 if zero is None else zero)).clamp_(-most - 1, most)
    return codes.to(torch.int8), codes if zero is None else codes - zero


@cache
def _order(codebook: str) -> np.ndarray:
    """The codes uint8 [16] of a codebook's values in their order."""
    return codebooks.ORDER[codebook] if codebook in codebooks.ORDER else np.arange(16, dtype=np.uint8)


def divisors(scale: torch.Tensor, codebook: str) -> torch.Tensor:
    """What weights are divided by for their codes: scales, of which those of codebooks may be 0."""
    return scale.clamp(min=_TINY) if codebook else scale


def product(entries: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What entries stand for under their scales: float32, rounded to dtype."""
    found = entries * scale
    return found if dtype == torch.float32 else found.to(dtype).float()


def codes_dtype(codebook: str) -> torch.dtype:
    """int8 for integers, float8 for E4M3, else uint8."""
    return {"": torch.int8, "e4m3": torch.float8_e4m3fn}.get(codebook, torch.uint8)


def for_kernel(codebook: str, bits: int, dtype: torch.dtype) -> tuple[tuple, tuple[np.ndarray, ...]]:
    """(what kernels are told of a grid, tables that must live as long as the call)."""
    is_table = codebook in TABLES
    tables = (*ranked(codebook), _order(codebook).astype(np.float32)) if is_table else ()
    addresses = [cpu.address(each) for each in tables] or [None] * 3
    limits = -float(1 << (bits - 1)), float((1 << (bits - 1)) - 1)
    return (FORMS.index("table" if is_table else codebook), *limits, *addresses, cpu.DTYPES[dtype]), tables


def check_grid(op: str, scale: torch.Tensor, zero_point: torch.Tensor | None, codebook: str, bits: int, dtype: torch.dtype) -> None:
    """Raises ValueError or TypeError for a grid that there is not."""
    if codebook not in (*TABLES, *FORMS[2:], ""):
        raise ValueError(f"{op}: codebook is {codebook!r}, expected {', '.join((*TABLES, *FORMS[2:]))}, or nothing")
    if not codebook and not 2 <= bits <= 8:
        raise ValueError(f"{op}: bits is {bits}, expected 2 to 8")
    if codebook and zero_point is not None:
        raise ValueError(f"{op}: zero points with the codebook {codebook}, expected none")
    if dtype not in cpu.DTYPES:
        raise TypeError(f"{op}: dtype is {dtype}, expected float32, bfloat16 or float16")
    if scale.dim() != 2 or (zero_point is not None and zero_point.shape != scale.shape):
        given = "nothing" if zero_point is None else str(list(zero_point.shape))
        raise ValueError(f"{op}: scale is {list(scale.shape)} and zero_point {given}, expected two dimensions, and the same")
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{op}: {name} is {tensor.dtype}, expected torch.float32")
