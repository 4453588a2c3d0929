"""Inputs of products whose weight has scales of groups or rows: integers with and without zero points, MXFP4, NVFP4, E4M3."""

from collections.abc import Iterator

import torch

from qcli.ops._library import blocks

CPU = torch.device("cpu")

# By name: quant_type, block_size, the dtype of absmax, which is x's if None, and whether there are zero points.
FOUR = {
    "int4": ("int4", 128, None, False),
    "int4-zeros": ("int4", 128, None, True),
    "int4-of-64-zeros": ("int4", 64, None, True),
    "int4-of-32-zeros": ("int4", 32, None, True),
    "int4-float32-zeros": ("int4", 128, torch.float32, True),
    "mxfp4": ("e2m1", 32, torch.float8_e8m0fnu, False),
    "nvfp4": ("e2m1", 16, torch.float8_e4m3fn, False),
}
# By name: the dtype of codes, the size of groups, 0 for rows, and whether there are zero points.
EIGHT = {
    "int8-rows": (torch.int8, 0, False),
    "int8": (torch.int8, 128, False),
    "int8-zeros": (torch.int8, 128, True),
    "int8-of-64-zeros": (torch.int8, 64, True),
    "int8-of-32-zeros": (torch.int8, 32, True),
    "e4m3-rows": (torch.float8_e4m3fn, 0, False),
    "e4m3": (torch.float8_e4m3fn, 128, False),
}


def _e4m3(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Every value but NaN."""
    bits = torch.randint(0x7F, shape, dtype=torch.uint8, device=device)
    return (bits | torch.randint(2, shape, dtype=torch.uint8, device=device) << 7).view(torch.float8_e4m3fn)


def four_bits(kind: str, tokens: int, out_features: int, in_features: int, dtype: torch.dtype, *, bias=None, device=CPU) -> dict:
    """Arguments of linear_4bit with a weight of random codes. `bias` is the dtype of the bias."""
    quant_type, size, stored, with_zeros = FOUR[kind]
    count = out_features * in_features // size
    if stored == torch.float8_e8m0fnu:
        absmax = torch.randint(118, 124, (count,), dtype=torch.uint8, device=device).view(stored)
    elif stored == torch.float8_e4m3fn:
        absmax = _e4m3((count,), device)
    else:
        absmax = (torch.rand(count, device=device) * 0.05 + 0.01).to(stored or dtype)
    return {
        "x": torch.randn(tokens, in_features, device=device).to(dtype),
        "packed": torch.randint(256, (out_features * in_features // 2, 1), dtype=torch.uint8, device=device),
        "absmax": absmax,
        "nested_absmax": torch.tensor([700.0], device=device) if stored == torch.float8_e4m3fn else None,
        "offset": 0.0,
        "bias": None if bias is None else torch.randn(out_features, device=device).to(bias),
        "block_size": size,
        "quant_type": quant_type,
        "out_features": out_features,
        "compute_dtype": dtype,
        "zero_point": torch.randint(-128, 128, (count,), dtype=torch.int8, device=device) if with_zeros else None,
    }


def eight_bits(kind: str, tokens: int, out_features: int, in_features: int, dtype: torch.dtype, *, bias=None, device=CPU) -> dict:
    """Arguments of linear_w8a16 with a weight of random codes. `bias` is the dtype of the bias."""
    of_codes, size, with_zeros = EIGHT[kind]
    shape, groups = (out_features, in_features), (out_features, blocks(in_features, size) if size else 1)
    integers = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    return {
        "x": torch.randn(tokens, in_features, device=device).to(dtype),
        "weight": integers if of_codes == torch.int8 else _e4m3(shape, device),
        "scale": torch.rand(groups, device=device) * 0.001 + 0.0005,
        "bias": None if bias is None else torch.randn(out_features, device=device).to(bias),
        "group_size": size,
        "zero_point": torch.randint(-128, 128, groups, dtype=torch.int8, device=device) if with_zeros else None,
    }


def hostile_four(dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """As inputs.hostile, of linear_4bit."""
    for kind in FOUR:
        for tokens, *shape in ((1, 1, 128), (7, 17, 384), (8, 33, 2560), (12, 65, 256), (33, 66, 640), (65, 9, 128)):
            bias = dtype if tokens % 2 else None
            yield f"{kind}-{tokens}x{shape[0]}x{shape[1]}", four_bits(kind, tokens, *shape, dtype, bias=bias)
        spoiled = four_bits(kind, 3, 20, 256, dtype)
        if spoiled["absmax"].element_size() == 1:
            spoiled["absmax"].view(torch.uint8)[5] = 0xFF  # NaN
        else:
            spoiled["absmax"][5] = torch.inf
        yield f"{kind}-spoiled", spoiled


def hostile_eight(dtype: torch.dtype) -> Iterator[tuple[str, dict]]:
    """As inputs.hostile, of linear_w8a16."""
    for kind in EIGHT:
        for tokens, *shape in ((1, 1, 16), (3, 17, 256), (8, 33, 2064), (5, 40, 4352), (9, 15, 64), (0, 8, 64)):
            bias = dtype if tokens % 2 else None
            yield f"{kind}-{tokens}x{shape[0]}x{shape[1]}", eight_bits(kind, tokens, *shape, dtype, bias=bias)
