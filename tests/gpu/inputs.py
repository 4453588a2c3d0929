"""Inputs in addition to an op's own cases: real layers, and small hostile ones. They are on the CPU unless a device is given."""

from collections.abc import Iterator

import torch

from qcli import codebooks
from qcli.ops.activate import KINDS
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.ops.quantize_int8 import quantize_int8
from qcli.ops.rope_append import quantized, tables
from tests.gpu import groups, tables_of_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")

# out_features, in_features
LAYERS = {
    "llama-7b-q": (4096, 4096),
    "llama-7b-up": (11008, 4096),
    "llama-7b-down": (4096, 11008),
    "llama-13b-up": (13824, 5120),
    "llama-70b-kv": (1024, 8192),
    "llama-70b-up": (28672, 8192),
    "llama-70b-down": (8192, 28672),
    "opt-175b-up": (49152, 12288),
}


def activations(tokens: int, columns: int, dtype: torch.dtype, outliers: int = 0, device=CPU) -> torch.Tensor:
    """Normal values. In that many columns the first element is beyond a threshold of 6."""
    x = torch.randn(tokens, columns, device=device)
    chosen = torch.randperm(columns, device=device)[:outliers]
    if tokens:
        x[torch.randint(tokens, (1,)).item(), chosen] = 40.0
    return x.to(dtype)


def layer_4bit(
    tokens, out_features, in_features, dtype, *, block_size=64, quant_type="nf4", nested=True, bias=None, device=CPU
) -> dict:
    """Arguments of linear_4bit with a weight of random codes. `bias` is the dtype of the bias."""
    blocks = out_features * in_features // block_size
    packed = torch.randint(256, (out_features * in_features // 2, 1), dtype=torch.uint8, device=device)
    absmax, nested_absmax, offset = torch.rand(blocks, device=device) * 0.05 + 0.01, None, 0.0
    if nested:
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
        nested_absmax, offset = torch.rand(-(-blocks // 256), device=device) * 0.02, 0.03
    return {
        "x": activations(tokens, in_features, dtype, device=device),
        "packed": packed,
        "absmax": absmax,
        "nested_absmax": nested_absmax,
        "offset": offset,
        "bias": None if bias is None else torch.randn(out_features, device=device).to(bias),
        "block_size": block_size,
        "quant_type": quant_type,
        "out_features": out_features,
        "compute_dtype": dtype,
    }


def layer_8bit(tokens, out_features, in_features, dtype, *, outliers=0, threshold=6.0, bias=None, device=CPU) -> dict:
    """Arguments of linear_int8 with a weight of random codes."""
    return {
        "x": activations(tokens, in_features, dtype, outliers, device),
        "weight": torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=device),
        "scale": torch.rand(out_features, device=device) * 0.1 + 0.05,
        "bias": None if bias is None else torch.randn(out_features, device=device).to(bias),
        "threshold": threshold,
    }


def w8a16(arguments: dict) -> dict:
    """The arguments of linear_w8a16, from those of linear_int8."""
    return {name: value for name, value in arguments.items() if name not in ("threshold", "fixed", "original")}


def with_fixed(arguments: dict, count: int) -> dict:
    """Arguments of linear_int8 with `count` fixed columns, in no order."""
    x, rows = arguments["x"], len(arguments["weight"])
    columns = torch.randperm(x.shape[-1], device=x.device)[:count].int()
    return arguments | {"fixed": columns, "original": torch.randn(rows, count, device=x.device).bfloat16()}


def hostile(name: str, dtypes=DTYPES) -> Iterator[tuple[str, dict]]:
    """(id, arguments): sizes that fit no tile, non-finite values, unusual options."""
    for dtype in dtypes:
        for case, arguments in _HOSTILE[name](dtype):
            yield f"{str(dtype)[6:]}-{case}", arguments


def _spoiled(x: torch.Tensor) -> torch.Tensor:
    """Values with NaN, infinities, zeros and the largest finite value."""
    x = x.clone()
    flat = x.view(-1)
    most = torch.finfo(x.dtype).max
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, most, -most], dtype=x.dtype)
    flat[torch.randperm(flat.numel())[: len(values)]] = values[: flat.numel()]
    return x


def _quantize_4bit(dtype):
    for quant_type in codebooks.THRESHOLDS:
        for block_size, count in ((2, 77), (6, 1000), (16, 4097), (64, 64 * 999 + 1), (256, 5000), (512, 5001), (64, 3)):
            x = torch.randn(count).to(dtype)
            yield f"{quant_type}-{block_size}-{count}", _of_4bit(x, block_size, quant_type)
        yield f"{quant_type}-spoiled", _of_4bit(_spoiled(torch.randn(40, 64).to(dtype)), 64, quant_type)


def _of_4bit(x, block_size, quant_type):
    return {"x": x, "block_size": block_size, "quant_type": quant_type}


def _dequantize_4bit(dtype):
    for name, arguments in _quantize_4bit(dtype):
        x, options = arguments["x"], {key: arguments[key] for key in ("block_size", "quant_type")}
        packed, absmax = quantize_4bit(x, **options)
        yield name, {"packed": packed, "absmax": absmax, **options, "shape": list(x.shape), "dtype": dtype}


def _quantize_absmax(dtype):
    if dtype == torch.float32:
        for count in (2, 257, 70_001):
            absmax = torch.rand(count) * 3
            yield str(count), {"absmax": absmax, "offset": mean_absmax(absmax)}
        spoiled = _spoiled(torch.rand(1000))
        yield "spoiled", {"absmax": spoiled, "offset": mean_absmax(spoiled)}


def _dequantize_absmax(dtype):
    for name, arguments in _quantize_absmax(dtype):
        codes, nested_absmax = quantize_absmax(**arguments)
        yield name, {"codes": codes, "nested_absmax": nested_absmax, "offset": arguments["offset"]}


def _quantize_int8(dtype):
    for rows, columns in ((1, 1), (1, 7), (3, 8), (300, 9), (17, 2048), (2, 4104), (40, 11008)):
        for threshold in (0.0, 6.0):
            x = activations(rows, columns, dtype, outliers=columns // 3)
            yield f"{rows}x{columns}-{threshold}", {"x": x, "threshold": threshold}
    yield "all-outliers", {"x": activations(5, 264, dtype), "threshold": 1e-6}
    yield "spoiled", {"x": _spoiled(torch.randn(50, 72).to(dtype)), "threshold": 6.0}


def _dequantize_int8(dtype):
    for rows, columns in ((1, 1), (5, 7), (300, 2056), (2, 11008)):
        q, absmax, _ = quantize_int8(torch.randn(rows, columns), 0.0)
        yield f"{rows}x{columns}", {"q": q, "absmax": absmax, "dtype": dtype}
    q, absmax, _ = quantize_int8(_spoiled(torch.randn(9, 40)), 0.0)
    yield "spoiled", {"q": q, "absmax": absmax, "dtype": dtype}


def _activation_stats(dtype):
    for shape in ((1, 1), (65, 129), (3, 1000, 40), (5000, 2)):
        yield "x".join(map(str, shape)), {"x": torch.randn(shape).to(dtype) * 3, "threshold": 6.0}
    yield "spoiled", {"x": _spoiled(torch.randn(100, 72).to(dtype)), "threshold": 6.0}


def _linear_4bit(dtype):
    sizes = (
        (1, 1, 64),
        (2, 15, 320),
        (4, 17, 1024),
        (8, 129, 192),
        (9, 63, 64),
        (16, 65, 448),
        (17, 1, 256),
        (32, 130, 1088),
        (33, 66, 64),
        (63, 64, 512),
        (64, 67, 320),
        (65, 9, 64),
        (0, 16, 64),
    )
    for tokens, out_features, in_features in sizes:
        nested = out_features % 2 == 1
        bias = DTYPES[tokens % 3] if tokens % 2 else None
        arguments = layer_4bit(tokens, out_features, in_features, dtype, nested=nested, bias=bias)
        yield f"{tokens}x{out_features}x{in_features}", arguments
    yield "fp4", layer_4bit(3, 40, 512, dtype, quant_type="fp4")
    yield "blocks-of-32", layer_4bit(5, 33, 96, dtype, block_size=32, bias=torch.float32)
    yield "blocks-of-256", layer_4bit(12, 33, 768, dtype, block_size=256)
    yield "blocks-of-one-row-and-a-half", layer_4bit(2, 32, 96, dtype, block_size=64)
    yield "no-rows", layer_4bit(2, 0, 64, dtype)
    spoiled = layer_4bit(7, 40, 384, dtype)
    spoiled["x"] = _spoiled(spoiled["x"])
    yield "spoiled", spoiled
    for other in DTYPES:
        if other != dtype:
            mixed = layer_4bit(6, 20, 256, dtype, bias=other)
            yield f"x-{str(other)[6:]}", mixed | {"x": mixed["x"].to(other)}
    yield from groups.hostile_four(dtype)


def _linear_int8(dtype):
    sizes = (
        (1, 1, 16),
        (3, 17, 272),
        (8, 129, 256),
        (8, 40, 4112),
        (9, 15, 64),
        (2, 33, 30),
        (16, 8, 8),
        (17, 9, 77),
        (33, 130, 1024),
        (100, 257, 304),
        (129, 127, 144),
        (0, 8, 16),
        (4, 0, 16),
    )
    for tokens, out_features, in_features in sizes:
        bias = DTYPES[tokens % 3] if tokens % 2 else None
        for threshold in (0.0, 6.0):
            arguments = layer_8bit(
                tokens, out_features, in_features, dtype, outliers=in_features // 9, threshold=threshold, bias=bias
            )
            yield f"{tokens}x{out_features}x{in_features}-{threshold}", arguments
    for tokens in (1, 8, 40):
        for outliers in (0, 1, 16, 17, 300, 512):
            yield f"{tokens}-outliers-{outliers}", layer_8bit(tokens, 48, 512, dtype, outliers=outliers)
        for fixed in (1, 16, 17, 512):
            yield f"{tokens}-fixed-{fixed}", with_fixed(layer_8bit(tokens, 48, 512, dtype, outliers=6), fixed)
        spoiled = layer_8bit(tokens, 24, 256, dtype)
        spoiled["x"] = _spoiled(spoiled["x"])
        yield f"{tokens}-spoiled", spoiled
        yield f"{tokens}-threshold-tiny", layer_8bit(tokens, 20, 128, dtype, threshold=1e-6)
        yield f"{tokens}-threshold-huge", layer_8bit(tokens, 20, 128, dtype, outliers=5, threshold=1e30)


def _linear_w8a16(dtype):
    sizes = ((1, 1, 16), (3, 17, 272), (8, 129, 256), (7, 40, 4112), (9, 15, 64), (2, 33, 30), (0, 8, 16), (4, 0, 16))
    for tokens, out_features, in_features in sizes:
        bias = DTYPES[tokens % 3] if tokens % 2 else None
        arguments = layer_8bit(tokens, out_features, in_features, dtype, outliers=3, bias=bias)
        yield f"{tokens}x{out_features}x{in_features}", w8a16(arguments)
    spoiled = layer_8bit(5, 24, 256, dtype)
    yield "spoiled", w8a16(spoiled | {"x": _spoiled(spoiled["x"])})
    yield from groups.hostile_eight(dtype)


def _activate(dtype):
    for kind in KINDS:
        for tokens, columns in ((1, 1), (3, 257), (8, 1100)):
            gate, up = 5 * torch.randn(2, tokens, columns).to(dtype)
            yield f"{kind}-{tokens}x{columns}", {"gate": gate, "up": up if tokens > 1 else None, "kind": kind}
        yield f"{kind}-spoiled", {"gate": _spoiled(torch.randn(4, 40).to(dtype)), "up": None, "kind": kind}


def _norm(dtype):
    for shape in ((1, 1), (3, 33), (2, 5, 80), (4, 1024), (2, 1025), (1, 9000)):
        x, residual = torch.randn(2, *shape).to(dtype)
        for centered in (False, True):
            given = {"x": x, "residual": None, "weight": None, "bias": None, "eps": 1e-6, "centered": centered, "factor": 1.0}
            yield f"{'x'.join(map(str, shape))}-{centered}", given
            for other in DTYPES:
                vectors = {"weight": torch.rand(shape[-1]).to(other), "bias": torch.rand(shape[-1]).to(dtype)}
                added = {"residual": residual.to(other), "factor": 0.5}
                yield f"{'x'.join(map(str, shape))}-{centered}-{str(other)[6:]}", given | vectors | added
    yield "spoiled", given | {"x": _spoiled(torch.randn(5, 70).to(dtype))}


def cache(kv_heads, capacity, head_dim, v_dim, stored, device=CPU) -> dict:
    """A cache of random keys and values."""
    given = {"key_scales": None, "value_scales": None}
    for name, scales, dim in (("keys", "key_scales", head_dim), ("values", "value_scales", v_dim)):
        rows = torch.randn(kv_heads, capacity, dim, device=device)
        given[name] = rows.to(stored)
        if stored == torch.int8:
            given[name], given[scales] = quantized(rows)
    return given


def _rope_append(dtype):
    # tokens, heads, kv_heads, head_dim, v_dim, rot_dim, capacity, start
    small = (1, 1, 1, 1, 1, 0, 1, 0), (8, 3, 1, 34, 70, 34, 11, 5)
    sizes = (*small, (2, 16, 8, 128, 64, 32, 50, 777), (1, 4, 2, 256, 256, 256, 4, 3))
    for stored in (*DTYPES, torch.int8):
        for tokens, heads, kv_heads, head_dim, v_dim, rot_dim, capacity, start in sizes:
            for spoiled in (False, True):
                rows = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, v_dim))
                q, k, v = (torch.randn(tokens, *size).to(dtype) for size in rows)
                interleaved = tokens == 8
                cos, sin = tables(start + tokens, rot_dim, interleaved) if rot_dim else (None, None)
                given = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, **cache(kv_heads, capacity, head_dim, v_dim, stored)}
                if spoiled:
                    given |= {name: _spoiled(given[name]) for name in "qkv"}
                name = f"{str(stored)[6:]}-{tokens}x{heads}x{head_dim}-{'spoiled' if spoiled else 'plain'}"
                yield name, given | {"start": torch.tensor(start), "interleaved": interleaved}


def _attend(dtype):
    # tokens, heads, kv_heads, head_dim, v_dim, capacity, start, window
    small = (1, 1, 1, 1, 1, 1, 0, 0), (8, 3, 1, 34, 70, 60, 40, 0), (3, 4, 2, 72, 64, 50, 777, 48)
    sizes = (*small, (2, 8, 1, 128, 256, 400, 300, 0), (1, 5, 5, 256, 32, 500, 7000, 500))
    for stored in (*DTYPES, torch.int8):
        for tokens, heads, kv_heads, head_dim, v_dim, capacity, start, window in sizes:
            given = {"q": torch.randn(tokens, heads, head_dim).to(dtype), **cache(kv_heads, capacity, head_dim, v_dim, stored)}
            given |= {"sinks": torch.randn(heads) if window else None, "start": torch.tensor(start), "window": window}
            given |= {"scale": head_dim**-0.5, "softcap": 15.0 if heads == 8 else 0.0}
            yield f"{str(stored)[6:]}-{tokens}x{heads}x{head_dim}-{start}", given
        given["q"] = _spoiled(given["q"])
        yield f"{str(stored)[6:]}-spoiled", given


_HOSTILE = {
    "activate": _activate,
    "activation_stats": _activation_stats,
    "add_sparse": tables_of_values.hostile_sparse,
    "attend": _attend,
    "dequantize_4bit": _dequantize_4bit,
    "dequantize_absmax": _dequantize_absmax,
    "dequantize_int8": _dequantize_int8,
    "dequantize_table": tables_of_values.hostile_dequantize,
    "linear_4bit": _linear_4bit,
    "linear_int8": _linear_int8,
    "linear_table": tables_of_values.hostile_linear,
    "linear_w8a16": _linear_w8a16,
    "norm": _norm,
    "quantize_4bit": _quantize_4bit,
    "quantize_absmax": _quantize_absmax,
    "quantize_int8": _quantize_int8,
    "rope_append": _rope_append,
}
