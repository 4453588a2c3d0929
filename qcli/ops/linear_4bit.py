"""The product with a 4-bit weight: linear(x, dequantized W) in the compute dtype, back in x's dtype."""

import torch

from qcli.ops._library import define
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax


def _reference(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype):
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    shape = [out_features, x.shape[-1]]
    weight = dequantize_4bit(packed, absmax, block_size, quant_type, shape, compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    return torch.nn.functional.linear(x.to(compute_dtype), weight, bias).to(x.dtype)


def _fake(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype):
    return x.new_empty((*x.shape[:-1], out_features))


_op = define(
    "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, float offset, Tensor? bias, "
    "int block_size, str quant_type, int out_features, ScalarType compute_dtype) -> Tensor",
    _reference,
    _fake,
)


def linear_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: float,
    bias: torch.Tensor | None,
    block_size: int,
    quant_type: str,
    out_features: int,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """x [..., in_features]; packed uint8 [ceil(out*in/2), 1]; bias [out_features] or None.

    absmax is float32 [blocks], or its uint8 codes where nested_absmax float32 [ceil(blocks/256)] is given with its
    offset. Returns [..., out_features] in x's dtype.
    """
    return _op(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (((1, 128), 48, 64), ((5, 70), 33, 32), ((2, 65, 64), 16, 256))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for nested in (False, True):
            for shape, out_features, block_size in shapes:
                weight = torch.randn(out_features, shape[-1], generator=generator).to(dtype)
                packed, absmax = quantize_4bit(weight, block_size, "nf4")
                offset, nested_absmax = 0.0, None
                if nested:
                    offset = mean_absmax(absmax)
                    absmax, nested_absmax = quantize_absmax(absmax, offset)
                size = f"{'x'.join(map(str, shape))}x{out_features}-{block_size}"
                yield (
                    f"{str(dtype)[6:]}-{'nested' if nested else 'plain'}-{size}",
                    {
                        "x": torch.randn(shape, generator=generator).to(dtype),
                        "packed": packed,
                        "absmax": absmax,
                        "nested_absmax": nested_absmax,
                        "offset": offset,
                        "bias": torch.randn(out_features, generator=generator).to(dtype) if len(shape) > 2 else None,
                        "block_size": block_size,
                        "quant_type": "nf4",
                        "out_features": out_features,
                        "compute_dtype": dtype,
                    },
                )
