"""Inputs of products with weights of 2, 3 and 4 bits whose codes name entries of a table, and with a sparse part."""

from collections.abc import Iterator

import torch

from qcli.ops._library import blocks
from qcli.packing import plane_bytes

CPU = torch.device("cpu")

# By name: block_size, whether each row has a table, absmax, and zero points.
KINDS = {
    "of-64": (64, False, True, False),
    "of-128-zeros": (128, False, True, True),
    "of-192": (192, False, True, False),
    "rows-zeros": (0, False, True, True),
    "tables-of-rows": (0, True, False, False),
    "tables-of-rows-of-64-zeros": (64, True, True, True),
    "of-32": (32, False, True, False),  # which has no kernel
}


def weight(kind: str, bits: int, out_features: int, in_features: int, device=CPU) -> dict:
    """A weight of random codes: the arguments of dequantize_table but for the dtype."""
    size, own, scaled, with_zeros = KINDS[kind]
    groups = out_features, blocks(in_features, size or max(1, in_features))
    shape = out_features, plane_bytes(in_features, bits)
    return {
        "packed": torch.randint(256, shape, dtype=torch.uint8, device=device),
        "table": torch.randn((out_features, 1 << bits) if own else (1 << bits,), device=device),
        "absmax": torch.rand(groups, device=device) * 0.05 + 0.01 if scaled else None,
        "zero_point": torch.randn(groups, device=device) if with_zeros else None,
        "bits": bits,
        "block_size": size,
        "out_features": out_features,
        "in_features": in_features,
    }


def product(kind: str, bits: int, tokens: int, out_features: int, in_features: int, dtype, *, bias=None, device=CPU) -> dict:
    """Arguments of linear_table with a weight of random codes. `bias` is the dtype of the bias."""
    given = weight(kind, bits, out_features, in_features, device)
    del given["in_features"]
    return given | {
        "x": torch.randn(tokens, in_features, device=device).to(dtype),
        "bias": None if bias is None else torch.randn(out_features, device=device).to(bias),
        "compute_dtype": dtype,
    }


def hostile_linear(dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """As inputs.hostile, of linear_table."""
    for bits in (2, 3, 4):
        for kind in KINDS:
            for tokens, *shape in ((1, 1, 64), (3, 17, 576), (8, 33, 2112), (5, 40, 100), (9, 9, 128), (0, 8, 64)):
                bias = dtype if tokens % 2 else None
                yield f"{bits}-{kind}-{tokens}x{shape[0]}x{shape[1]}", product(kind, bits, tokens, *shape, dtype, bias=bias)
        zeros = product("tables-of-rows", bits, 2, 20, 128, dtype)
        zeros["table"][3], zeros["table"][5] = 0, 3e-38
        yield f"{bits}-tiny-tables", zeros
        mixed = product("of-64", bits, 6, 20, 256, torch.float16, bias=dtype)
        yield f"{bits}-computed-in-float16", mixed | {"x": mixed["x"].to(dtype)}
        spoiled = product("of-64", bits, 3, 20, 256, dtype)
        spoiled["absmax"][5, 1] = torch.inf
        yield f"{bits}-spoiled", spoiled


def hostile_dequantize(dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """As inputs.hostile, of dequantize_table."""
    for bits in (2, 3, 4):
        for kind in KINDS:
            for rows, columns in ((1, 1), (5, 63), (17, 264), (0, 64), (3, 0)):
                yield f"{bits}-{kind}-{rows}x{columns}", weight(kind, bits, rows, columns) | {"dtype": dtype}


def hostile_sparse(dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """As inputs.hostile, of add_sparse."""
    for tokens, rows, columns, count in ((1, 1, 1, 1), (3, 33, 70, 500), (8, 200, 4096, 300), (2, 9, 64, 0), (0, 8, 16, 20)):
        ends = torch.randint(0, count + 1, (rows - 1,)).sort().values
        yield (
            f"{tokens}x{rows}x{columns}-{count}",
            {
                "y": torch.randn(tokens, rows).to(dtype),
                "x": torch.randn(tokens, columns).to(dtype),
                "values": torch.randn(count),
                "columns": torch.randint(0, columns, (count,), dtype=torch.int32),
                "offsets": torch.cat((torch.tensor([0]), ends, torch.tensor([count]))).int(),
            },
        )
