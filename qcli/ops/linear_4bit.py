"""The product with a 4-bit weight: linear(x, dequantized W) in the compute dtype, rounded to x's dtype.

The weight is in blocks of the flattened matrix: NF4 and FP4, and if blocks divide rows, integers and small floats in groups of a
row.
"""

import math

import torch

from qcli import codebooks
from qcli.ops import _linear_4bit_cuda
from qcli.ops._library import blocks, define, differentiate, product_dtype
from qcli.ops.dequantize_4bit import decoded_absmax, dequantize_4bit, expand
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import GROUP_SIZE, mean_absmax, quantize_absmax
from qcli.runtime import cpu


def _weight(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point):
    """The weight, of the op's arguments."""
    shape = [out_features, x.shape[-1]]
    absmax = decoded_absmax(absmax, nested_absmax, offset, quant_type)
    return dequantize_4bit(packed, absmax, block_size, quant_type, shape, compute_dtype, zero_point)


def _reference(
    x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point=None
):
    of_weight = packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point
    weight = _weight(x, *of_weight)
    bias = None if bias is None else bias.to(compute_dtype)
    return torch.nn.functional.linear(x.to(compute_dtype), weight, bias).to(x.dtype)


def _fake(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point):
    return x.new_empty((*x.shape[:-1], out_features))


# Bytes of expanded weight at a time: the cache keeps them until they are multiplied, and torch's product reaches its full speed.
_PANEL_BYTES = min(max(2 << 20, cpu.last_level_cache() // 2), 16 << 20)

_kernel = cpu.kernel("linear_4bit", "piqpp")


def _most_tokens(compute_dtype: torch.dtype, plain: bool) -> int:
    """Tokens up to which panels are slower.

    With AVX2 the kernel multiplies 16-bit integers, about as fast as torch multiplies float32, and expands nothing: 1.65 times as
    fast for 32 tokens, equal for 128, slower for 250. Where torch multiplies bfloat16 (AVX-512), panels are as fast for 24 tokens
    and 1.5 times as fast for 64. `plain` says that there are no zero points, which that path does not know, and no blocks of 16."""
    in_integers = compute_dtype == torch.bfloat16 and cpu.variant() == "avx2" and plain
    return 96 if in_integers else Prepared4bit.MOST_TOKENS


_CODES = {quant_type: cpu.address(code) for quant_type, code in codebooks.CODEBOOKS.items()}
_LINES = cpu.address(codebooks.DYNAMIC_LINES)
_SMALL = {torch.float8_e4m3fn: 3, torch.float8_e8m0fnu: 4, torch.uint8: 0}  # dtypes of absmax, by their numbers in kernels


class Prepared4bit:
    """A weight, checked and prepared for the CPU kernel for few tokens. Its arguments after in_features are those of the op after
    x. It raises the same errors as the op."""

    MOST_TOKENS = 16  # of a call past the op
    STEP = "linear_4bit_step"

    def __init__(
        self,
        in_features,
        packed,
        absmax,
        nested_absmax,
        offset,
        bias,
        block_size,
        quant_type,
        out_features,
        compute_dtype,
        zero_point=None,
    ):
        op = "linear_4bit"
        if block_size < 2 or block_size % 2:
            raise ValueError(f"{op}: block_size is {block_size}, expected an even number")
        count, unit = blocks(out_features * in_features, block_size), codebooks.UNITS[quant_type]
        packed = cpu.require(op, "packed", packed, torch.uint8, (out_features * in_features + 1) // 2)
        small, nested = _SMALL.get(absmax.dtype), absmax.dtype == torch.uint8
        if (nested and nested_absmax is None) or (small is None and nested_absmax is not None):
            raise ValueError(f"{op}: absmax is {absmax.dtype} {'without' if nested_absmax is None else 'with'} nested_absmax")
        absmax = cpu.require(op, "absmax", absmax, absmax.dtype, count)
        dtype = cpu.dtype_code(op, absmax, "absmax") if small is None else small
        if nested:
            nested_absmax = cpu.require(op, "nested_absmax", nested_absmax, torch.float32, blocks(count, GROUP_SIZE))
        elif nested_absmax is not None:
            unit /= float(cpu.require(op, "nested_absmax", nested_absmax, torch.float32, 1))
        if zero_point is not None:
            zero_point = cpu.require(op, "zero_point", zero_point, torch.int8, count)
        if bias is not None:
            bias = cpu.require(op, "bias", bias, bias.dtype, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = cpu.Record(
            "ppppppp" + "qqqq" + "iffi",
            packed,
            absmax,
            _LINES if nested else None,
            nested_absmax if nested else None,
            zero_point,
            _CODES[quant_type],
            bias,
            0 if bias is None else cpu.dtype_code(op, bias, "bias"),
            block_size,
            out_features,
            in_features,
            dtype,
            unit,
            offset,
            compute_dtype == torch.bfloat16,
        )

        self.addresses = self.weight.addresses

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        _kernel(x.contiguous(), cpu.dtype_code("linear_4bit", x), tokens, self.weight.address, y)
        return y


def _cpu(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point):
    in_features = x.shape[-1]
    weight = (packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point)
    if not in_features:
        return _reference(x, *weight)
    prepared = Prepared4bit(in_features, *weight)
    if x.numel() <= _most_tokens(compute_dtype, zero_point is None and block_size != 16) * in_features:
        return prepared(x)
    absmax = decoded_absmax(absmax, nested_absmax, offset, quant_type)
    dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 and cpu.native_bfloat16() else torch.float32
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
    rows = x.reshape(-1, in_features).to(dtype)
    arguments = packed.contiguous(), absmax.contiguous(), bias, block_size, quant_type, zero_point
    _by_panels(rows, *arguments, y.view(-1, out_features))
    return y


def _by_panels(x, packed, absmax, bias, block_size, quant_type, zero_point, y):
    """Expands a few rows of the weight at a time. torch multiplies them while the cache still holds them."""
    in_features, out_features = x.shape[1], y.shape[1]
    bias = None if bias is None else bias.to(x.dtype)
    # A panel begins at a whole byte.
    grain = 1 + in_features % 2
    step = grain * max(1, _PANEL_BYTES // (in_features * x.element_size() * grain))
    panel = torch.empty(min(step, out_features), in_features, dtype=x.dtype)
    for start in range(0, out_features, step):
        part = panel[: out_features - start]
        expand(packed, absmax, block_size, quant_type, start * in_features, part, zero_point)
        some = None if bias is None else bias[start : start + step]
        y[:, start : start + step] = torch.nn.functional.linear(x, part, some)


def _cuda(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point=None):
    weight = (packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point)
    y = _linear_4bit_cuda.run(x, *weight)
    return _reference(x, *weight) if y is None else y


_op = define(
    "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, float offset, Tensor? bias, "
    "int block_size, str quant_type, int out_features, ScalarType compute_dtype, Tensor? zero_point) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def _rows(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point):
    """See differentiate. A panel begins at a whole block, and so at a whole byte."""
    in_features = x.shape[1]
    decoded = decoded_absmax(absmax, nested_absmax, offset, quant_type) * (1 / codebooks.UNITS[quant_type])

    def take(start: int, stop: int) -> tuple:
        begin, end = start * in_features, stop * in_features
        of_blocks = slice(begin // block_size, blocks(end, block_size))
        zeros = None if zero_point is None else zero_point.reshape(-1)[of_blocks]
        codes = packed.reshape(-1, 1)[begin // 2 : (end + 1) // 2]
        scales = decoded.view(-1)[of_blocks]
        return codes, scales, None, 0.0, None, block_size, quant_type, stop - start, compute_dtype, zeros

    return block_size // math.gcd(in_features, block_size), take


def _of_gradient(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point):
    """The weight by which the gradient with respect to x is made."""
    dtype = product_dtype(x, compute_dtype)
    return _weight(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, dtype, zero_point)


differentiate("linear_4bit", _of_gradient, _rows)


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
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., in_features]; packed uint8 [ceil(out*in/2), 1]; bias [out_features] or None; zero_point int8 [blocks] or None.

    absmax [blocks] is a float, float8_e8m0fnu, float8_e4m3fn or, under double quantization, the uint8 codes. nested_absmax is for
    the last two: float32 [1], by which E4M3 is divided; or float32 [ceil(blocks/256)] and its offset, for the codes. A name in
    codebooks.CODEBOOKS is `quant_type`; of "int4" and "e2m1", absmax is what multiplies the values -8 to 7 and -6 to 6. Returns
    [..., out_features] in x's dtype. Autograd differentiates with respect to x alone.
    """
    arguments = (packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point)
    return _op(x, *arguments)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (((1, 128), 48, 64), ((5, 70), 33, 32), ((2, 65, 64), 16, 256))
    # Whole and partial turns of 256 columns, whole and partial tiles of 16 or 64 rows, every number of tokens that matters.
    more = (
        ((1, 2304), 40, 64),
        ((7, 416), 37, 32),
        ((8, 640), 20, 128),
        ((12, 320), 70, 64),
        ((2, 10, 512), 130, 128),
        ((33, 576), 17, 64),
        ((20, 2560), 130, 64),
        ((40, 1856), 65, 64),
        ((64, 1600), 64, 64),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for nested in (False, True):
            for shape, out_features, block_size in shapes + (more if nested == (dtype == torch.bfloat16) else ()):
                weight = torch.randn(out_features, shape[-1], generator=generator).to(dtype)
                quant_type = "fp4" if block_size == 128 else "nf4"
                packed, absmax = quantize_4bit(weight, block_size, quant_type)
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
                        "quant_type": quant_type,
                        "out_features": out_features,
                        "compute_dtype": dtype,
                        "zero_point": None,
                    },
                )
    yield from _cases_of_groups(generator)


def _cases_of_groups(generator: torch.Generator):
    """Integers with and without zero points, and E2M1 under each kind of scale."""
    kinds = (
        ("int4", 128, torch.bfloat16, True),
        ("int4", 64, torch.float32, True),
        ("int4", 32, torch.float16, False),
        ("int4", 192, torch.bfloat16, True),
        ("e2m1", 32, torch.float8_e8m0fnu, False),
        ("e2m1", 16, torch.float8_e4m3fn, False),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for quant_type, size, of_absmax, with_zero in kinds:
            for shape, out_features in (((1, 384), 48), ((5, 192), 33), ((3, 2304), 40), ((2, 9, 576), 40), ((70, 384), 20)):
                if shape[-1] % size:
                    continue
                count = out_features * shape[-1] // size
                absmax = torch.rand(count, generator=generator) * 0.1 + 0.01
                if of_absmax == torch.float8_e8m0fnu:
                    absmax = (torch.rand(count, generator=generator) * 6 + 120).to(torch.uint8).view(of_absmax)
                zero_point = torch.randint(-8, 8, (count,), generator=generator).to(torch.int8)
                yield (
                    f"{str(dtype)[6:]}-{quant_type}-{size}-{'x'.join(map(str, shape))}x{out_features}",
                    {
                        "x": torch.randn(shape, generator=generator).to(dtype),
                        "packed": torch.randint(0, 256, (out_features * shape[-1] // 2, 1), generator=generator).to(torch.uint8),
                        "absmax": absmax if of_absmax == torch.float8_e8m0fnu else absmax.to(of_absmax),
                        "nested_absmax": torch.tensor([3.3]) if of_absmax == torch.float8_e4m3fn else None,
                        "offset": 0.0,
                        "bias": torch.randn(out_features, generator=generator).to(dtype) if len(shape) > 2 else None,
                        "block_size": size,
                        "quant_type": quant_type,
                        "out_features": out_features,
                        "compute_dtype": dtype,
                        "zero_point": zero_point if with_zero else None,
                    },
                )
