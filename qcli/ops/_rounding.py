"""What the ops that round rows share: the sums of what rounding cost."""

import torch

from qcli.runtime import cpu


def error_sums(x: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """float64 [3] of elements and what is stored of them: squared error, squared norm, elements that are NaN or infinite. Those are
    in neither sum, nor are elements that are stored as such. Squares are float32."""
    wide, stored = x.float(), stored.float()
    finite = wide.isfinite() & stored.isfinite()
    if finite.all():
        error, norm = (wide - stored).square_(), wide.square()
    else:
        error = (wide - stored).masked_fill_(~finite, 0.0).square_()
        norm = wide.masked_fill(~finite, 0.0).square_()
    lost = (~wide.isfinite()).sum().double()
    return torch.stack((error.sum(dtype=torch.float64), norm.sum(dtype=torch.float64), lost))


def rows_together(x: torch.Tensor, multiple: int = 1) -> int:
    """Rows of a piece of x [rows, columns], a multiple of `multiple`. On a CPU it is so small that the intermediate values stay in
    its cache."""
    return max(1, (1 << (16 if x.is_cpu else 24)) // max(x.shape[1] * multiple, 1)) * multiple


def total(partial: torch.Tensor) -> torch.Tensor:
    """The sums of a kernel's partial ones float64 [parts, 3]. numpy adds in order. torch would split the sum among threads, and the
    result would depend on their number."""
    return torch.from_numpy(partial.numpy().sum(0))


def check_matrix(op: str, x: torch.Tensor, size: int, divides: bool = True) -> None:
    """Raises ValueError unless x has rows, in whole groups of `size` where it `divides`, and TypeError for another dtype."""
    cpu.dtype_code(op, x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has {x.dim()} dimensions, expected rows and columns")
    if size < 1 or (divides and x.shape[1] % size):
        raise ValueError(f"{op}: size is {size}, expected a divisor of rows of {x.shape[1]}")
