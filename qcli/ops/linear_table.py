"""The product with a weight of 2, 3 or 4 bits whose codes name entries of a table: y = x W^T + bias, with

  W[n, k] = (table[n or 0][code[n, k]] - zero_point[n, g]) * absmax[n, g],   g = k // block_size

rounded to the compute dtype. One table is that of the whole weight, as NF3's or that of integers, or each output row has its own.
"""

from functools import partial

import torch

from qcli.ops._library import blocks, define, differentiate, persistent_grid, product_dtype
from qcli.ops.add_sparse import PreparedSparse
from qcli.ops.dequantize_table import checked, dequantize_table, made, shape_of
from qcli.packing import plane_bytes
from qcli.runtime import cpu, cuda


def _weight(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype):
    """The weight, of the op's arguments."""
    return dequantize_table(packed, table, absmax, zero_point, bits, block_size, out_features, x.shape[-1], compute_dtype)


def _reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    table: torch.Tensor,
    absmax: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block_size: int,
    out_features: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    weight = _weight(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    return torch.nn.functional.linear(x.to(compute_dtype), weight, bias).to(x.dtype)


def _fake(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype):
    return x.new_empty((*x.shape[:-1], out_features))


# Bytes of expanded weight at a time: the cache keeps them until they are multiplied, and torch's product reaches its full speed.
_PANEL_BYTES = min(max(2 << 20, cpu.last_level_cache() // 2), 16 << 20)

_kernel = cpu.kernel("linear_table", "piqpp")


class PreparedTable:
    """A weight, checked and prepared for the CPU kernel for few tokens. Its arguments after in_features are those of the op after
    x, and `sparse`: the matrix (values, columns, offsets) whose product is added, as `add_sparse` takes it, or None. It raises the
    same errors as the ops."""

    MOST_TOKENS = 16  # for more tokens, torch's product of an expanded weight is faster
    STEP = "linear_table_step"

    def __init__(
        self, in_features, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype, sparse=None
    ):
        op, self.in_features, self.out_features = "linear_table", in_features, out_features
        shape = shape_of(op, table, bits, block_size, out_features, in_features)
        tensors = checked(cpu.require, op, shape, packed, table, absmax, zero_point)
        if bias is not None:
            bias = cpu.require(op, "bias", bias, bias.dtype, out_features)
        self.sparse = None if sparse is None else PreparedSparse(in_features, *sparse)
        if self.sparse is not None and self.sparse.out_features != out_features:
            raise ValueError(f"{op}: offsets are for {self.sparse.out_features} rows, expected {out_features}")
        self.weight = cpu.Record(
            "ppppp" + "qqqqqq" + "pi",
            *tensors,
            bias,
            0 if bias is None else cpu.dtype_code(op, bias, "bias"),
            bits,
            table.dim() == 2,
            shape.size,
            out_features,
            in_features,
            None if self.sparse is None else self.sparse.weight.address,
            compute_dtype == torch.bfloat16,
        )
        self.addresses = self.weight.addresses | (set() if self.sparse is None else self.sparse.addresses)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        _kernel(x.contiguous(), cpu.dtype_code("linear_table", x), tokens, self.weight.address, y)
        return y


def _cpu(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype):
    in_features = x.shape[-1]
    weight = packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype
    if not in_features:
        return _reference(x, *weight)
    prepared = PreparedTable(in_features, *weight)
    if x.numel() <= PreparedTable.MOST_TOKENS * in_features:
        return prepared(x)
    dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 and cpu.native_bfloat16() else torch.float32
    y = x.new_empty((*x.shape[:-1], out_features))
    _by_panels(x.reshape(-1, in_features).to(dtype), *weight[:-2], y.view(-1, out_features))
    return y


def _by_panels(x, packed, table, absmax, zero_point, bias, bits, block_size, y):
    """Expands a few rows of the weight at a time. torch multiplies them while the cache still holds them."""
    in_features, out_features = x.shape[1], y.shape[1]
    packed = packed.reshape(out_features, plane_bytes(in_features, bits))
    step = max(1, _PANEL_BYTES // (in_features * x.element_size()))
    for start in range(0, out_features, step):
        part = slice(start, start + step)
        tensors = packed[part], table if table.dim() == 1 else table[part]
        scales = [None if each is None else each.reshape(out_features, -1)[part] for each in (absmax, zero_point)]
        rows = len(tensors[0])
        panel = dequantize_table(*tensors, *scales, bits, block_size, rows, in_features, x.dtype)
        some = None if bias is None else bias[part].to(x.dtype)
        y[:, part] = torch.nn.functional.linear(x, panel, some)


_FEW = 8  # the most tokens of the CUDA kernel
_UNIT = 64  # columns: those of a weight, and groups, are multiples for the CUDA kernel
_kernel_cuda = cuda.kernel("linear_table", "pippppp" + "qip")


def _cuda(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype):
    op, in_features = "linear_table", x.shape[-1]
    shape = shape_of(op, table, bits, block_size, out_features, in_features)
    tokens = x.numel() // in_features if in_features else 0
    on_tensor_cores = compute_dtype == torch.float16 or (compute_dtype == torch.bfloat16 and cuda.capability(x) >= (8, 0))
    fits = in_features % _UNIT == 0 and (shape.groups == 1 or shape.size % _UNIT == 0)
    if not (0 < tokens <= _FEW and on_tensor_cores and fits and out_features):
        return _reference(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype)
    tensors = checked(partial(cuda.require, device=x.device), op, shape, packed, table, absmax, zero_point)
    if bias is not None:
        bias = cuda.require(op, "bias", bias.to(compute_dtype), compute_dtype, out_features, x.device)
    rows = cuda.aligned(x.reshape(-1, in_features).to(compute_dtype))
    y = rows.new_empty((tokens, out_features))
    constants = (
        f"DTYPE={cuda.TYPES[compute_dtype]}",
        f"BITS={bits}",
        f"OWN={int(table.dim() == 2)}",
        f"GROUP={shape.size // _UNIT if shape.groups > 1 else 0}",
    )
    if zero_point is not None:
        constants += ("ZERO=1",)
    grid = persistent_grid(x, blocks(out_features, 16), 2 * 8 * 8 * 20 * 4)
    addresses = [0 if tensor is None else tensor for tensor in (*tensors, bias)]
    _kernel_cuda(constants, grid, 256, 0, rows, tokens, *addresses, out_features, in_features, y)
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


_op = define(
    "linear_table(Tensor x, Tensor packed, Tensor table, Tensor? absmax, Tensor? zero_point, Tensor? bias, int bits, "
    "int block_size, int out_features, ScalarType compute_dtype) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def _rows(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype):
    """See differentiate."""
    codes = packed.view(out_features, -1)
    scales = [None if each is None else each.view(out_features, -1) for each in (absmax, zero_point)]

    def take(start: int, stop: int) -> tuple:
        entries = table if table.dim() == 1 else table[start:stop]
        of_groups = (None if each is None else each[start:stop] for each in scales)
        return codes[start:stop], entries, *of_groups, None, bits, block_size, stop - start, compute_dtype

    return 1, take


def _of_gradient(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype):
    """The weight by which the gradient with respect to x is made."""
    dtype = product_dtype(x, compute_dtype)
    return _weight(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, dtype)


differentiate("linear_table", _of_gradient, _rows)


def linear_table(
    x: torch.Tensor,
    packed: torch.Tensor,
    table: torch.Tensor,
    absmax: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    block_size: int,
    out_features: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """x [..., in_features] float; packed uint8 [out_features, bytes] of packing.pack_planes, with 2, 3 or 4 bits; table float32
    [2^bits] or [out_features, 2^bits]; absmax and zero_point float32 [out_features, ceil(in_features / block_size)] or None; bias
    [out_features] or None. block_size 0 stands for whole rows. Returns [..., out_features] in x's dtype. Raises ValueError for
    other sizes. Autograd differentiates with respect to x alone."""
    return _op(x, packed, table, absmax, zero_point, bias, bits, block_size, out_features, compute_dtype)


# block_size, and whether there are a table for each row, absmax, and zero points.
_KINDS = {
    "blocks-of-64": (64, False, True, False),
    "blocks-of-128-zeros": (128, False, True, True),
    "blocks-of-32-zeros": (32, False, True, True),
    "rows": (0, False, True, False),
    "tables-of-rows": (0, True, False, False),
    "tables-of-rows-zeros": (64, True, False, True),
}


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    # Whole and partial units, an odd number of them, one row and many, every number of tokens that matters.
    shapes = (((1, 256), 48), ((3, 192), 37), ((2, 2, 1088), 20), ((7, 100), 5), ((1, 2304), 130), ((2, 20, 320), 33))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in (2, 3, 4):
            for (shape, rows), (kind, (size, *with_)) in zip(shapes, _KINDS.items()):
                yield _case(generator, f"{kind}-{bits}", shape, rows, dtype, bits, size, *with_)
    for bits in (2, 3, 4):  # groups that are no multiple of 32, and one that ends within a unit
        yield _case(generator, f"blocks-of-50-{bits}", (4, 230), 9, torch.bfloat16, bits, 50, bits == 3, True, True)
        yield _case(generator, f"blocks-of-96-{bits}", (5, 864), 21, torch.bfloat16, bits, 96, bits == 3, True, True)


def _case(generator: torch.Generator, name: str, shape, rows: int, dtype: torch.dtype, *how):
    weight = made(generator, rows, shape[-1], *how)
    return (
        f"{str(dtype)[6:]}-{name}-{'x'.join(map(str, shape))}x{rows}",
        {
            "x": torch.randn(shape, generator=generator).to(dtype),
            **{key: value for key, value in weight.items() if isinstance(value, torch.Tensor) or value is None},
            "bias": torch.randn(rows, generator=generator).to(dtype) if len(shape) > 2 else None,
            "bits": weight["bits"],
            "block_size": weight["block_size"],
            "out_features": rows,
            "compute_dtype": dtype,
        },
    )
