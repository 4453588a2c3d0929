"""The values of codes that name entries of a table: (table[code] - zero_point) * absmax in float32, rounded once to the wanted
dtype.

A table is that of the whole weight, or of one output row. absmax and zero point are those of groups of a row.
"""

from functools import partial
from typing import NamedTuple

import torch

from qcli.ops._library import blocks, define
from qcli.packing import pack_planes, plane_bytes, unpack_planes
from qcli.runtime import cpu, cuda


class Shape(NamedTuple):
    """The sizes of a weight, checked."""

    out_features: int
    in_features: int
    bits: int
    size: int  # columns of a group

    @property
    def groups(self) -> int:
        return blocks(self.in_features, self.size)

    @property
    def packed(self) -> int:
        return self.out_features * plane_bytes(self.in_features, self.bits)


def shape_of(op: str, table: torch.Tensor, bits: int, block_size: int, out_features: int, in_features: int) -> Shape:
    """Raises ValueError for bits, groups or tables that no weight has."""
    if bits not in (2, 3, 4):
        raise ValueError(f"{op}: bits is {bits}, expected 2, 3 or 4")
    if block_size < 0:
        raise ValueError(f"{op}: block_size is {block_size}, expected 0 for whole rows, or more")
    if list(table.shape) not in ([1 << bits], [out_features, 1 << bits]):
        raise ValueError(f"{op}: table is {list(table.shape)}, expected [{1 << bits}] or [{out_features}, {1 << bits}]")
    return Shape(out_features, in_features, bits, block_size or max(1, in_features))


def checked(require, op: str, shape: Shape, packed, table, absmax, zero_point) -> tuple:
    """The tensors of a weight for a kernel. `require` is that of the kernel's runtime. Raises ValueError."""
    packed = require(op, "packed", packed, torch.uint8, shape.packed)
    table = require(op, "table", table, torch.float32, table.numel())
    scales = []
    for name, values in (("absmax", absmax), ("zero_point", zero_point)):
        given = values is not None
        scales.append(require(op, name, values, torch.float32, shape.out_features * shape.groups) if given else None)
    return packed, table, *scales


def _reference(
    packed: torch.Tensor,
    table: torch.Tensor,
    absmax: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    block_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    shape = shape_of("dequantize_table", table, bits, block_size, out_features, in_features)
    codes = unpack_planes(packed.reshape(out_features, plane_bytes(in_features, bits)), bits, in_features).long()
    values = table[codes] if table.dim() == 1 else table.gather(1, codes)
    for scale, apply in ((zero_point, torch.sub), (absmax, torch.mul)):
        if scale is not None:
            spread = scale.reshape(out_features, shape.groups).repeat_interleave(shape.size, 1)
            values = apply(values, spread[:, :in_features])
    return values.to(dtype)


def _fake(packed, table, absmax, zero_point, bits, block_size, out_features, in_features, dtype):
    return packed.new_empty((out_features, in_features), dtype=dtype)


_kernel = cpu.kernel("dequantize_table", "ppippiqqqip")


def _cpu(packed, table, absmax, zero_point, bits, block_size, out_features, in_features, dtype):
    op = "dequantize_table"
    shape = shape_of(op, table, bits, block_size, out_features, in_features)
    packed, table, absmax, zero_point = checked(cpu.require, op, shape, packed, table, absmax, zero_point)
    out = cpu.empty([out_features, in_features], dtype)
    if out.numel():
        sizes = bits, shape.size, out_features, in_features
        _kernel(packed, table, table.dim() == 2, absmax, zero_point, *sizes, cpu.dtype_code(op, out, "dtype"), out)
    return out


_kernel_cuda = cuda.kernel("dequantize_table", "ppppqqqp")


def _cuda(packed, table, absmax, zero_point, bits, block_size, out_features, in_features, dtype):
    op = "dequantize_table"
    shape = shape_of(op, table, bits, block_size, out_features, in_features)
    require = partial(cuda.require, device=packed.device)
    packed, *rest = checked(require, op, shape, packed, table, absmax, zero_point)
    out = packed.new_empty((out_features, in_features), dtype=dtype)
    if out.numel():
        constants = f"DTYPE={cuda.type_name(op, out, 'dtype')}", f"BITS={bits}", f"OWN={int(table.dim() == 2)}"
        grid = min(blocks(out_features * blocks(in_features, 8), 256), 32 * cuda.multiprocessors(out))
        addresses = [0 if tensor is None else tensor for tensor in rest]
        _kernel_cuda(constants, (grid,), 256, 0, packed, *addresses, shape.size, out_features, in_features, out)
    return out


_op = define(
    "dequantize_table(Tensor packed, Tensor table, Tensor? absmax, Tensor? zero_point, int bits, int block_size, int out_features, "
    "int in_features, ScalarType dtype) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def dequantize_table(
    packed: torch.Tensor,
    table: torch.Tensor,
    absmax: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    bits: int,
    block_size: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """packed uint8 [out_features, bytes] of packing.pack_planes, with 2, 3 or 4 bits; table float32 [2^bits] or [out_features,
    2^bits]; absmax and zero_point float32 [out_features, ceil(in_features / block_size)] or None. block_size 0 stands for whole
    rows. Returns [out_features, in_features] in `dtype`: float32, bfloat16 or float16. Raises ValueError for other sizes."""
    return _op(packed, table, absmax, zero_point, bits, block_size, out_features, in_features, dtype)


def made(generator: torch.Generator, rows: int, columns: int, bits: int, block_size: int, of_rows: bool, absmax: bool, zero: bool):
    """A random weight: the arguments from packed to block_size, by name."""
    groups = blocks(columns, block_size or max(1, columns))
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator).to(torch.uint8)
    table = torch.randn((rows, 1 << bits) if of_rows else (1 << bits,), generator=generator).sort(-1).values
    return {
        "packed": pack_planes(codes, bits),
        "table": table,
        "absmax": torch.rand(rows, groups, generator=generator) + 0.5 if absmax else None,
        "zero_point": torch.randn(rows, groups, generator=generator) if zero else None,
        "bits": bits,
        "block_size": block_size,
    }


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    kinds = (
        (64, False, True, False),
        (0, True, False, False),
        (96, False, True, True),
        (50, True, False, True),
        (7, False, True, True),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in (2, 3, 4):
            for (rows, columns), (size, *with_) in zip(((6, 256), (5, 192), (7, 100), (3, 65), (2, 41)), kinds):
                weight = made(generator, rows, columns, bits, size, *with_)
                rest = {"out_features": rows, "in_features": columns, "dtype": dtype}
                yield f"{str(dtype)[6:]}-{bits}-{rows}x{columns}-{size}", weight | rest
