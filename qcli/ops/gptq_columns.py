"""A block of columns under GPTQ (arXiv:2210.17323, algorithm 1): each is rounded to the nearest values that its scales allow, and
the later columns of the block make up for what it is off by.

With U the upper Cholesky factor of H^-1, for each column j in its order
  value_j = code_j's entry times scale_j,  error_j = (w_j - value_j) / U_jj,  w_k -= U_jk error_j for every later k of the block
The product and the difference are two roundings to float32. A row of the weight knows nothing of the others.

Entries are those of qcli/ops/_grid.py. On a GPU the reference runs, a few operations for each column, which all rows share.
"""

import torch

from qcli.ops._grid import TABLES, check_grid, codes_dtype, divisors, for_kernel, product, round_entries
from qcli.ops._library import define
from qcli.runtime import cpu

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _reference(
    w: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    groups: torch.Tensor,
    codebook: str,
    bits: int,
    dtype: torch.dtype,
) -> _Results:
    _check(w, upper, scale, zero_point, groups, codebook, bits, dtype)
    codes, values, errors = _fake(w, upper, scale, zero_point, groups, codebook, bits, dtype)
    columns = w.clone()
    for j, group in enumerate(groups.tolist()):
        zero = None if zero_point is None else zero_point[group]
        codes[j], entries = round_entries(columns[j] / divisors(scale[group], codebook), zero, codebook, bits)
        values[j] = product(entries, scale[group], dtype)
        errors[j] = (columns[j] - values[j]) / upper[j, j]
        columns[j + 1 :] -= upper[j, j + 1 :].unsqueeze(1) * errors[j]
    return codes, values, errors


def _fake(w, upper, scale, zero_point, groups, codebook, bits, dtype):
    return w.new_empty(w.shape, dtype=codes_dtype(codebook)), torch.empty_like(w), torch.empty_like(w)


def _check(w, upper, scale, zero_point, groups, codebook, bits, dtype):
    op = "gptq_columns"
    check_grid(op, scale, zero_point, codebook, bits, dtype)
    if w.dim() != 2:
        raise ValueError(f"{op}: w has {w.dim()} dimensions, expected 2")
    expected = {
        "w": (w, w.shape, torch.float32),
        "upper": (upper, (len(w), len(w)), torch.float32),
        "scale": (scale, (len(scale), w.shape[1]), torch.float32),
        "groups": (groups, (len(w),), torch.int32),
    }
    for name, (tensor, shape, kind) in expected.items():
        if tensor.shape != shape or tensor.dtype != kind:
            raise ValueError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected {kind} {tuple(shape)}")


_kernel = cpu.kernel("gptq_columns", "qqpppppiffpppippp")


def _cpu(
    w: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    groups: torch.Tensor,
    codebook: str,
    bits: int,
    dtype: torch.dtype,
) -> _Results:
    _check(w, upper, scale, zero_point, groups, codebook, bits, dtype)
    w, lower, scale, groups = w.contiguous(), upper.t().contiguous(), scale.contiguous(), groups.contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    if len(groups) and not 0 <= int(groups.min()) <= int(groups.max()) < len(scale):
        raise ValueError(f"gptq_columns: groups are up to {int(groups.max())}, expected 0 to {len(scale) - 1}")
    results = _fake(w, upper, scale, zero_point, groups, codebook, bits, dtype)
    grid, _tables = for_kernel(codebook, bits, dtype)
    _kernel(*w.shape, w, lower, scale, zero_point, groups, *grid, *results)
    return results


_op = define(
    "gptq_columns(Tensor w, Tensor upper, Tensor scale, Tensor? zero_point, Tensor groups, str codebook, int bits, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    _cpu,
)


def gptq_columns(
    w: torch.Tensor,
    upper: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    groups: torch.Tensor,
    codebook: str,
    bits: int,
    dtype: torch.dtype,
) -> _Results:
    """w float32 [columns, rows] has the columns of a block in their order. upper float32 [columns, columns] is the block of U on
    its diagonal. scale float32 [groups, rows]; zero_point the same, or None; groups int32 [columns] says which of them a column
    has. codebook is "" for integers of `bits` bits, 2 to 8; bits is not used with "nf4", "fp4", "nf3", "e4m3" or "e2m1". What a
    code stands for is rounded to dtype.

    Returns codes [columns, rows], int8 for integers, float8_e4m3fn for e4m3, else uint8; what they stand for, float32; and the
    errors over the diagonal of U, float32, which columns after the block are to make up for. Raises ValueError or TypeError for
    anything else.
    """
    return _op(w, upper, scale, zero_point, groups, codebook, bits, dtype)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    forms = [("", bits, zero) for bits in (2, 3, 4, 8) for zero in (False, True)]
    forms += [(name, 4, False) for name in (*TABLES, "e4m3", "e2m1")]
    for codebook, bits, with_zero in forms:
        name = codebook or f"int{bits}{'-zero' * with_zero}"
        for columns, rows, groups, dtype in (
            (128, 80, 3, torch.float32),
            (48, 67, 48, torch.bfloat16),
            (33, 9, 1, torch.float16),
            (1, 64, 1, torch.float32),
            (7, 0, 2, torch.float32),
        ):
            w = torch.randn(columns, rows, generator=generator)
            mixed = torch.randn(columns, 2 * columns, generator=generator)
            upper = torch.linalg.cholesky(mixed @ mixed.t() / columns + 0.1 * torch.eye(columns), upper=True)
            reach = {"e4m3": 448.0, "e2m1": 6.0, "": float(2 ** (bits - 1))}.get(codebook, 1.0)
            scale = (torch.rand(groups, rows, generator=generator) + 1) / reach
            if not codebook:
                scale *= torch.where(torch.rand(groups, rows, generator=generator) < 0.3, -1.0, 1.0)
            zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (groups, rows), generator=generator).float()
            if rows > 8 and columns > 8:
                w[3, :5] = torch.tensor([0.0, -0.0, 1e10, -1e10, 1e-40])
                scale[0, 6] = 1e-20
                if codebook:
                    scale[0, 7] = 0.0
            yield (
                f"{name}-{columns}x{rows}-{groups}",
                {
                    "w": w,
                    "upper": upper,
                    "scale": scale,
                    "zero_point": zero if with_zero else None,
                    "groups": torch.randint(0, groups, (columns,), generator=generator, dtype=torch.int32),
                    "codebook": codebook,
                    "bits": bits,
                    "dtype": dtype,
                },
            )
