"""GPTQ: columns are rounded one after another, and each error is made up for by the columns that are still to come
(arXiv:2210.17323).

With H = sum x x^T over the calibration tokens, the outputs of a row w are off by (w - q) H (w - q)^T. Columns are taken in the
order of falling H_jj, the costly ones while most others can still give way. The scales are fixed before, so that groups lie where
they did and readers need no order of columns. With U the upper Cholesky factor of H^-1, for each column j
  q_j = nearest value to w_j,  e = (w_j - q_j) / U_jj,  w_k -= e U_jk for every later k
in blocks of 128 columns: what a block owes to later blocks is one product. The error of the outputs is the sum of all e^2. So what
an error of column j costs, once later columns have made up for it, is 1 / U_jj^2 and not E[x_j^2]: these are the weights for the
search of scales.

Each H_jj grows by `damping` of itself, and by a hundredth of that share of the mean of all. A share of the mean alone, as is
usual, would be most of H where a few outlier channels make the mean. Where H is then not positive definite, the damping is doubled
until it is; `Found.damping` says what was used. A channel that no token ever reached has H_jj = 0: its column is rounded to
nearest.

A row for which plain rounding has the smaller error, which is rare, keeps that. Afterwards the scales are fitted again by least
squares under H, with the codes as they are, and kept if the error falls.
"""

from dataclasses import dataclass, replace

import torch

from qcli.errors import NonFiniteError
from qcli.methods._grid import Grid
from qcli.ops.gptq_columns import gptq_columns
from qcli.ops.round_to_grid import round_to_grid

BLOCK = 128
_LARGEST_DAMPING = 1e3
_ROWS = 1 << 25  # elements of the normal equations that are made at a time
_RIDGE = 1e-4
_OF_MEAN = 0.01  # of the damping


@dataclass
class Found:
    """Codes [out_features, in_features] under `grid`, and what they stand for, float32 of that shape. `dead` counts the channels
    that no token reached. `errors` are the `row_errors`, where they are known."""

    grid: Grid
    codes: torch.Tensor
    values: torch.Tensor
    damping: float = 0.0
    dead: int = 0
    errors: torch.Tensor | None = None


def nearest(weight: torch.Tensor, grid: Grid) -> Found:
    """Rounds weight float32 [out_features, in_features] to nearest."""
    scheme, dtype = grid.scheme, grid.dtype or torch.float32
    codes, values = round_to_grid(weight, grid.scale, grid.zero_point, grid.size, scheme.codebook or "", scheme.bits, dtype)
    return Found(grid, codes, values)


def row_errors(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """e H e^T float64 [out_features] for the rows e of weight - values, float32 [out_features, in_features]: the squared error of
    each output, over all tokens of H float32 [in_features, in_features]."""
    error = weight - values
    return ((error @ hessian) * error).sum(1, dtype=torch.float64).clamp_(min=0)


def output_error(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    """The sum of `row_errors`: tr(E H E^T)."""
    return float(row_errors(weight, values, hessian).sum())


def best_of(weight: torch.Tensor, hessian: torch.Tensor, first: Found, second: Found) -> Found:
    """For each row the codes of whichever has the smaller error under H. Both have the same grid."""
    ours, theirs = (row_errors(weight, found.values, hessian) for found in (first, second))
    better = (theirs < ours).unsqueeze(1)
    codes, values = (torch.where(better, b, a) for a, b in ((first.codes, second.codes), (first.values, second.values)))
    return replace(first, codes=codes, values=values, errors=torch.minimum(ours, theirs))


@dataclass(frozen=True)
class Factor:
    """The upper Cholesky factor float32 of the inverse of H, whose columns stand in the given `order`; the damping that it took;
    bool [in_features] of the channels that no token reached."""

    upper: torch.Tensor
    order: torch.Tensor
    damping: float
    dead: torch.Tensor

    @property
    def importance(self) -> torch.Tensor:
        """1 / U_jj^2 float32 [in_features], with a mean of 1; 0 for dead channels."""
        found = torch.empty_like(self.upper.diagonal())
        found[self.order] = 1 / self.upper.diagonal().square()
        found[self.dead] = 0
        return found / found.mean().clamp(min=1e-30)


def factorized(hessian: torch.Tensor, damping: float) -> Factor:
    """Of H float32 [in_features, in_features], which is not changed. Raises NonFiniteError where no damping makes it positive
    definite."""
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    order = diagonal.argsort(descending=True, stable=True)
    ordered = hessian[order][:, order].double()
    diagonal = ordered.diagonal()
    mean = float(diagonal.mean())
    diagonal[dead[order]] = mean or 1.0
    bare = diagonal.clone()
    while damping <= _LARGEST_DAMPING:
        diagonal.copy_(bare * (1 + damping) + _OF_MEAN * damping * mean)
        lower, failed = torch.linalg.cholesky_ex(ordered)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return Factor(upper.float(), order, damping, dead)
        damping = 2 * damping or 1e-3
    raise NonFiniteError("the Hessian of its inputs is not positive definite under any damping", "Calibrate with another text.")


def gptq(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, factor: Factor) -> Found:
    """Rounds weight float32 [out_features, in_features] under H float32 [in_features, in_features]."""
    upper, order, scheme = factor.upper, factor.order, grid.scheme
    columns = weight.t()[order].contiguous()  # [in_features, out_features]: a column is contiguous
    scale, groups = grid.scale.t().contiguous(), (order // grid.size).int()
    zero = None if grid.zero_point is None else grid.zero_point.t().contiguous()
    parts = []
    for first in range(0, len(columns), BLOCK):
        block = slice(first, min(first + BLOCK, len(columns)))
        owed = upper[block, block.stop :]
        codes, values, errors = gptq_columns(
            columns[block],
            upper[block, block],
            scale,
            zero,
            groups[block],
            scheme.codebook or "",
            scheme.bits,
            grid.dtype or torch.float32,
        )
        columns[block.stop :].addmm_(owed.t(), errors, alpha=-1)
        parts.append((codes, values))
    back = order.argsort()
    codes, values = (torch.cat(each)[back].t().contiguous() for each in zip(*parts))
    found = Found(grid, codes, values, factor.damping, int(factor.dead.sum()))
    return best_of(weight, hessian, found, nearest(weight, grid))


def refitted(weight: torch.Tensor, hessian: torch.Tensor, found: Found) -> Found:
    """`found` with scales that fit its codes better under H: for each row the least squares solution. It is `found` itself where
    the error does not fall, and where scales are no free numbers."""
    grid = found.grid
    if grid.divides_rows or grid.scheme.share not in ("flat", "group", "row") or grid.scheme.scale not in ("float32", "model"):
        return found
    entries = grid.entries_of(found.codes)
    scale = torch.empty_like(grid.scale)
    step = max(1, _ROWS // (weight.shape[1] + grid.scale.shape[1] ** 2))
    for rows in range(0, len(weight), step):
        part = slice(rows, rows + step)
        scale[part] = _least_squares(weight[part], hessian, entries[part], grid.scale[part], grid.size)
    better = grid.with_scale(scale)
    values = better.values(entries)
    before = row_errors(weight, found.values, hessian) if found.errors is None else found.errors
    after = row_errors(weight, values, hessian)
    if after.sum() < before.sum():
        return replace(found, grid=better, values=values, errors=after)
    return found


def _least_squares(w: torch.Tensor, hessian: torch.Tensor, entries: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """The scales [rows, groups] for which the error of `entries` times them is least, near to `scale`, and of its signs."""
    rows, groups = scale.shape
    wide = torch.nn.functional.pad(entries, (0, groups * size - entries.shape[1]))
    matrix, right = w.new_empty(rows, groups, groups), w.new_empty(rows, groups)
    for group in range(groups):
        columns = slice(group * size, min((group + 1) * size, w.shape[1]))
        product = entries[:, columns] @ hessian[columns]
        right[:, group] = (product * w).sum(1)
        padded = torch.nn.functional.pad(product, (0, wide.shape[1] - w.shape[1]))
        matrix[:, group] = (padded * wide).view(rows, groups, size).sum(2)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    residual = right - (matrix @ scale.unsqueeze(2)).squeeze(2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True).clamp(min=1e-30)
    change, failed = torch.linalg.solve_ex(matrix, residual.unsqueeze(2))
    new = scale + change.squeeze(2)
    good = new.isfinite() & (new * scale > 0) & (failed == 0).unsqueeze(1)
    return torch.where(good, new, scale)
