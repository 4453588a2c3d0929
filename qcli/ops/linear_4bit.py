"""The product with a 4-bit weight: linear(x, dequantized W) in the compute dtype, rounded to x's dtype."""

import torch

from qcli import codebooks
from qcli.ops._library import blocks, define, persistent_grid
from qcli.ops.dequantize_4bit import dequantize_4bit, expand
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import GROUP_SIZE, mean_absmax, quantize_absmax
from qcli.runtime import cpu, cuda


def _reference(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype):
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    shape = [out_features, x.shape[-1]]
    weight = dequantize_4bit(packed, absmax, block_size, quant_type, shape, compute_dtype)
    bias = None if bias is None else bias.to(compute_dtype)
    return torch.nn.functional.linear(x.to(compute_dtype), weight, bias).to(x.dtype)


def _fake(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype):
    return x.new_empty((*x.shape[:-1], out_features))


# Bytes of expanded weight at a time: the cache keeps them until they are multiplied, and torch's product reaches its full speed.
_PANEL_BYTES = min(max(2 << 20, cpu.last_level_cache() // 2), 16 << 20)

_kernel = cpu.kernel("linear_4bit", "piqpp")


def _most_tokens(compute_dtype: torch.dtype) -> int:
    """Tokens up to which panels are slower.

    With AVX2 the kernel multiplies 16-bit integers, about as fast as torch multiplies float32, and expands nothing: 1.65 times as
    fast for 32 tokens, equal for 128, slower for 250. Where torch multiplies bfloat16 (AVX-512), panels are as fast for 24 tokens
    and 1.5 times as fast for 64."""
    return 96 if compute_dtype == torch.bfloat16 and cpu.variant() == "avx2" else Prepared4bit.MOST_TOKENS


_CODES = {quant_type: cpu.address(code) for quant_type, code in codebooks.CODEBOOKS.items()}
_MAP = cpu.address(codebooks.DYNAMIC_MAP)


class Prepared4bit:
    """A weight, checked and prepared for the CPU kernel for few tokens. Its arguments after in_features are those of the op after
    x. It raises the same errors as the op."""

    MOST_TOKENS = 16  # of a call past the op
    STEP = "linear_4bit_step"

    def __init__(
        self, in_features, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype
    ):
        op = "linear_4bit"
        if block_size < 2 or block_size % 2:
            raise ValueError(f"{op}: block_size is {block_size}, expected an even number")
        count = blocks(out_features * in_features, block_size)
        packed = cpu.require(op, "packed", packed, torch.uint8, (out_features * in_features + 1) // 2)
        absmax = cpu.require(op, "absmax", absmax, torch.float32 if nested_absmax is None else torch.uint8, count)
        if nested_absmax is not None:
            nested_absmax = cpu.require(op, "nested_absmax", nested_absmax, torch.float32, blocks(count, GROUP_SIZE))
        if bias is not None:
            bias = cpu.require(op, "bias", bias, bias.dtype, out_features)
        self.in_features, self.out_features = in_features, out_features
        self.weight = cpu.Record(
            "pppppppqqqqfi",
            packed,
            *((absmax, None) if nested_absmax is None else (None, absmax)),
            nested_absmax,
            _MAP,
            _CODES[quant_type],
            bias,
            0 if bias is None else cpu.dtype_code(op, bias, "bias"),
            block_size,
            out_features,
            in_features,
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


def _cpu(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype):
    in_features = x.shape[-1]
    weight = (packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype)
    if not in_features:
        return _reference(x, *weight)
    prepared = Prepared4bit(in_features, *weight)
    if x.numel() <= _most_tokens(compute_dtype) * in_features:
        return prepared(x)
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, offset)
    dtype = torch.bfloat16 if compute_dtype == torch.bfloat16 and cpu.native_bfloat16() else torch.float32
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
    rows = x.reshape(-1, in_features).to(dtype)
    _by_panels(rows, packed.contiguous(), absmax.contiguous(), bias, block_size, quant_type, y.view(-1, out_features))
    return y


def _by_panels(x, packed, absmax, bias, block_size, quant_type, y):
    """Expands a few rows of the weight at a time. torch multiplies them while the cache still holds them."""
    in_features, out_features = x.shape[1], y.shape[1]
    bias = None if bias is None else bias.to(x.dtype)
    # A panel begins at a whole byte.
    grain = 1 + in_features % 2
    step = grain * max(1, _PANEL_BYTES // (in_features * x.element_size() * grain))
    panel = torch.empty(min(step, out_features), in_features, dtype=x.dtype)
    for start in range(0, out_features, step):
        part = panel[: out_features - start]
        expand(packed, absmax, block_size, quant_type, start * in_features, part)
        some = None if bias is None else bias[start : start + step]
        y[:, start : start + step] = torch.nn.functional.linear(x, part, some)


_FEW = 8  # tokens of the first CUDA kernel
_few_cuda = cuda.kernel("linear_4bit", "pipppfpqiittp")
_batch_cuda = cuda.kernel("linear_4bit_batch", "pipppfpqiittpp")
_merge_cuda = cuda.kernel("linear_4bit_batch", "pipqqp", "merge_parts")
_CODE_BYTES = {quant_type: code.tobytes() for quant_type, code in codebooks.CODEBOOKS.items()}
_MAP_BYTES = codebooks.DYNAMIC_MAP.tobytes()
_TABLE = 256 * 32 * 4 + 256 * 4  # bytes of shared memory: the pair of values of every byte, and the map of double quantization


def _cuda(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype):
    op, device, in_features = "linear_4bit", x.device, x.shape[-1]
    tokens = x.numel() // in_features if in_features else 0
    on_tensor_cores = compute_dtype == torch.float16 or (compute_dtype == torch.bfloat16 and cuda.capability(x) >= (8, 0))
    fits = block_size % 32 == 0 and in_features % block_size == 0
    batch = tokens > _FEW and block_size % 64 == 0 and cuda.capability(x) >= (8, 0) and _most(x, tokens)
    if not on_tensor_cores or not fits or not (0 < tokens <= _FEW or batch) or not out_features:
        return _reference(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype)
    count, nested = out_features * in_features // block_size, nested_absmax is not None
    packed = cuda.require(op, "packed", packed, torch.uint8, (out_features * in_features + 1) // 2, device)
    absmax = cuda.require(op, "absmax", absmax, torch.uint8 if nested else torch.float32, count, device)
    if nested:
        groups = blocks(count, GROUP_SIZE)
        nested_absmax = cuda.require(op, "nested_absmax", nested_absmax, torch.float32, groups, device)
    if bias is not None:
        bias = cuda.require(op, "bias", bias.to(compute_dtype), compute_dtype, out_features, device)
    rows = cuda.aligned(x.reshape(-1, in_features).to(compute_dtype))
    y = rows.new_empty((tokens, out_features))
    chunk = 32 if block_size % 64 else 64
    constants = (f"DTYPE={cuda.TYPES[compute_dtype]}", f"CHUNK={chunk}", f"NESTED={int(nested)}")
    arguments = (
        rows,
        tokens,
        packed,
        absmax,
        nested_absmax if nested else 0,
        offset,
        0 if bias is None else bias,
        out_features,
        in_features,
        block_size,
        _CODE_BYTES[quant_type],
        _MAP_BYTES,
        y,
    )
    if tokens <= _FEW:
        full = block_size == chunk and in_features % (4 * chunk) == 0
        shared = _TABLE + 2 * 8 * 20 * 8 * 4
        grid = persistent_grid(x, blocks(out_features, 16), shared)
        _few_cuda((*constants, f"FULL={int(full)}"), grid, 256, shared, *arguments)
    else:
        _batch(x, y, constants, arguments, tokens)
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


def _batch(x: torch.Tensor, y: torch.Tensor, constants: tuple[str, ...], arguments: tuple, tokens: int) -> None:
    """Launches linear_4bit_batch.cu. Chooses its sizes, and into how many parts the columns are divided."""
    most, (out_features, in_features) = _most(x, tokens), (y.shape[1], arguments[0].shape[1])
    stage = _stage(most)
    # Two blocks share a multiprocessor if its shared memory allows. With 64 tokens the registers do not suffice.
    together = 2 if most < 64 and _TABLE + 2 * stage <= cuda.shared_memory(x) // 2 - 1024 else 1
    stages = 3 if _TABLE + 3 * stage <= cuda.shared_memory(x) // together - 1024 else 2
    shared = _TABLE + max(stages * stage, 4 * most * 68 * 4)
    tiles, turns = blocks(out_features, 64), blocks(in_features, 256)
    # Enough parts to fill the device once, each with a few turns of its own.
    parts = max(1, min(together * cuda.multiprocessors(x) // tiles, turns // 3))
    constants = (*constants, f"TOKENS={most}", f"STAGES={stages}")
    sums = x.new_empty((parts, tokens, out_features), dtype=torch.float32) if parts > 1 else None
    _batch_cuda(constants, (tiles, parts), 256, shared, *arguments, 0 if sums is None else sums)
    if sums is not None:
        bias = arguments[6]
        _merge_cuda(constants, (blocks(y.numel(), 256),), 256, 0, sums, parts, bias, y.numel(), out_features, y)


def _stage(most: int) -> int:
    """Bytes of shared memory of a stage: the codes of 64 rows and x of `most` tokens, 256 columns each, and padding."""
    return 64 * (128 + 32) + most * (512 + 16)


def _most(x: torch.Tensor, tokens: int) -> int:
    """The number of tokens for which linear_4bit_batch.cu is compiled. 0 if `tokens` are too many for this GPU."""
    fitting = (n for n in (16, 32, 64) if n >= tokens and _TABLE + 2 * _stage(n) <= cuda.shared_memory(x) - 1024)
    return next(fitting, 0)


_op = define(
    "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, float offset, Tensor? bias, "
    "int block_size, str quant_type, int out_features, ScalarType compute_dtype) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
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

    absmax is float32 [blocks]. If nested_absmax float32 [ceil(blocks/256)] and its offset are given, absmax is the uint8 codes
    [blocks]. Returns [..., out_features] in x's dtype.
    """
    return _op(x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype)


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
                    },
                )
