"""Adds x times a sparse matrix to the result of a product, in place: the few weights of a layer that are kept apart from its codes.

  y[..., n] += sum over i in offsets[n] .. offsets[n + 1] of x[..., columns[i]] * values[i]

The matrix is in compressed rows (CSR). Sums are float32, and y is rounded once more to its dtype.
"""

import torch

from qcli.ops._library import blocks, define
from qcli.runtime import cpu, cuda


def _rows(columns: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """The row of each element, int64."""
    numbers = torch.arange(len(offsets) - 1, device=columns.device)
    return numbers.repeat_interleave(offsets.diff().long(), output_size=len(columns))


def _reference(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, offsets: torch.Tensor) -> None:
    rows = _rows(columns, offsets)
    products = x.reshape(-1, x.shape[-1]).float()[:, columns.long()] * values.float()
    added = products.new_zeros(len(products), len(offsets) - 1).index_add_(1, rows, products)
    y.copy_((y.float() + added.view(y.shape)).to(y.dtype))


def _fake(y, x, values, columns, offsets):
    return None


_kernel = cpu.kernel("add_sparse", "ppiqp")


class PreparedSparse:
    """A matrix, checked and prepared for the CPU kernel. Its arguments are those of the op after x, and the columns of x."""

    def __init__(self, in_features: int, values: torch.Tensor, columns: torch.Tensor, offsets: torch.Tensor):
        op, self.in_features, self.out_features = "add_sparse", in_features, len(offsets) - 1
        values = cpu.require(op, "values", values, values.dtype, len(columns))
        columns = cpu.require(op, "columns", columns, torch.int32, len(columns))
        offsets = cpu.require(op, "offsets", offsets, torch.int32, len(offsets))
        _check(op, columns, offsets, in_features)
        sizes = self.out_features, in_features, cpu.dtype_code(op, values, "values")
        self.weight = cpu.Record("pppqqq", values, columns, offsets, *sizes)
        self.addresses = self.weight.addresses

    def __call__(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Adds x [..., in_features] times the matrix to y [..., out_features], contiguous and of x's dtype."""
        tokens = x.numel() // self.in_features if self.in_features else 0
        if tokens:
            _kernel(y, x.contiguous(), cpu.dtype_code("add_sparse", x), tokens, self.weight.address)


def _check(op: str, columns: torch.Tensor, offsets: torch.Tensor, in_features: int) -> None:
    """Raises ValueError for a matrix with elements outside. A kernel checks nothing."""
    ends = offsets[[0, -1]].tolist()
    if ends != [0, len(columns)] or (offsets.diff() < 0).any():
        raise ValueError(f"{op}: offsets go from {ends[0]} to {ends[1]}, expected to ascend from 0 to {len(columns)}")
    if len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < in_features:
        raise ValueError(f"{op}: columns go from {columns.min()} to {columns.max()}, expected 0 to {in_features - 1}")


def _cpu(y, x, values, columns, offsets):
    prepared = PreparedSparse(x.shape[-1], values, columns, offsets)
    if y.dtype != x.dtype or not y.is_contiguous():
        _reference(y, x, values, columns, offsets)
    else:
        prepared(y, x)


_kernel_cuda = cuda.kernel("add_sparse", "pipppqqp")


def _cuda(y, x, values, columns, offsets):
    op, rows, tokens = "add_sparse", len(offsets) - 1, x.numel() // max(1, x.shape[-1])
    if not (tokens and rows and len(columns)):
        return
    if y.dtype != x.dtype or not y.is_contiguous():
        _reference(y, x, values, columns, offsets)
        return
    values = cuda.require(op, "values", values, values.dtype, len(columns), x.device)
    columns = cuda.require(op, "columns", columns, torch.int32, len(columns), x.device)
    offsets = cuda.require(op, "offsets", offsets, torch.int32, len(offsets), x.device)
    constants = f"DTYPE={cuda.type_name(op, x)}", f"VALUE={cuda.type_name(op, values, 'values')}"
    grid = min(blocks(rows, 8), 8 * cuda.multiprocessors(x))
    _kernel_cuda(constants, (grid,), 256, 0, x.contiguous(), tokens, values, columns, offsets, rows, x.shape[-1], y)


_op = define(
    "add_sparse(Tensor(a!) y, Tensor x, Tensor values, Tensor columns, Tensor offsets) -> ()", _reference, _fake, _cpu, _cuda
)


def add_sparse(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, columns: torch.Tensor, offsets: torch.Tensor) -> None:
    """y [..., N] and x [..., K] float; values [count] float; columns int32 [count], of x; offsets int32 [N + 1]: the elements of
    row n are those from offsets[n] on, up to offsets[n + 1]. Changes y. Raises ValueError for offsets and columns outside, on a
    CPU. Autograd differentiates with respect to y and x."""
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
        matrix = y.new_zeros(len(offsets) - 1, x.shape[-1], dtype=torch.float32)
        matrix = matrix.index_put((_rows(columns, offsets), columns.long()), values.float(), accumulate=True)
        y += (x.float() @ matrix.t()).to(y.dtype)
    else:
        _op(y, x, values, columns, offsets)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for of_values in (torch.float32, torch.bfloat16):
            for shape, rows, share in (((1, 64), 40, 0.1), ((3, 200), 33, 0.02), ((2, 9, 96), 17, 0.5), ((5, 32), 8, 0.0)):
                chosen = torch.rand(rows, shape[-1], generator=generator) < share
                chosen[3] = False
                places = chosen.nonzero()
                counts = torch.bincount(places[:, 0], minlength=rows)
                yield (
                    f"{str(dtype)[6:]}-{str(of_values)[6:]}-{'x'.join(map(str, shape))}x{rows}",
                    {
                        "y": torch.randn(*shape[:-1], rows, generator=generator).to(dtype),
                        "x": torch.randn(shape, generator=generator).to(dtype),
                        "values": torch.randn(len(places), generator=generator).to(of_values),
                        "columns": places[:, 1].int(),
                        "offsets": torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0))).int(),
                    },
                )
