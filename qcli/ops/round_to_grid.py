"""Rounds a weight to the nearest values that its scales allow. What codes stand for is in qcli/ops/_grid.py."""

import torch

from qcli.ops._grid import check_grid, codes_dtype, divisors, for_kernel, product, round_entries
from qcli.ops._library import blocks, define
from qcli.ops.gptq_columns import cases as cases_of_columns
from qcli.runtime import cpu

_Results = tuple[torch.Tensor, torch.Tensor]


def _reference(
    w: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, size: int, codebook: str, bits: int, dtype: torch.dtype
) -> _Results:
    _check(w, scale, zero_point, size, codebook, bits, dtype)
    spread = scale.repeat_interleave(size, 1)[:, : w.shape[1]]
    zero = None if zero_point is None else zero_point.repeat_interleave(size, 1)[:, : w.shape[1]]
    codes, entries = round_entries(w / divisors(spread, codebook), zero, codebook, bits)
    return codes, product(entries, spread, dtype)


def _fake(w, scale, zero_point, size, codebook, bits, dtype):
    return w.new_empty(w.shape, dtype=codes_dtype(codebook)), w.new_empty(w.shape)


def _check(w, scale, zero_point, size, codebook, bits, dtype):
    check_grid("round_to_grid", scale, zero_point, codebook, bits, dtype)
    if w.dim() != 2 or w.dtype != torch.float32:
        raise ValueError(f"round_to_grid: w is {w.dtype} {list(w.shape)}, expected torch.float32 of two dimensions")
    expected = [len(w), blocks(w.shape[1], max(size, 1))]
    if size < 1 or list(scale.shape) != expected:
        raise ValueError(f"round_to_grid: scale is {list(scale.shape)} for groups of {size}, expected {expected}")


_kernel = cpu.kernel("round_to_grid", "qqqqpppiffpppipp")


def _cpu(
    w: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, size: int, codebook: str, bits: int, dtype: torch.dtype
) -> _Results:
    _check(w, scale, zero_point, size, codebook, bits, dtype)
    w, scale = w.contiguous(), scale.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    codes, values = _fake(w, scale, zero_point, size, codebook, bits, dtype)
    if w.numel():
        grid, _tables = for_kernel(codebook, bits, dtype)
        _kernel(*w.shape, size, scale.shape[1], w, scale, zero_point, *grid, codes, values)
    return codes, values


_op = define(
    "round_to_grid(Tensor w, Tensor scale, Tensor? zero_point, int size, str codebook, int bits, ScalarType dtype)"
    " -> (Tensor, Tensor)",
    _reference,
    _fake,
    _cpu,
)


def round_to_grid(
    w: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, size: int, codebook: str, bits: int, dtype: torch.dtype
) -> _Results:
    """w float32 [rows, columns]; scale float32 [rows, ceil(columns / size)], zero_point the same, or None: column k has the group
    k // size. codebook, bits and dtype are those of gptq_columns.

    Returns codes [rows, columns], int8 for integers, float8_e4m3fn for e4m3, else uint8, and what they stand for, float32. Raises
    ValueError or TypeError for anything else.
    """
    return _op(w, scale, zero_point, size, codebook, bits, dtype)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    for name, given in cases_of_columns():
        w = given["w"].t().contiguous()
        groups = min(len(given["scale"]), w.shape[1])
        size = blocks(w.shape[1], groups)
        count = blocks(w.shape[1], size)
        scale, zero_point = (None if t is None else t[:count].t().contiguous() for t in (given["scale"], given["zero_point"]))
        options = {key: given[key] for key in ("codebook", "bits", "dtype")}
        yield name, {"w": w, "scale": scale, "zero_point": zero_point, "size": size, **options}
