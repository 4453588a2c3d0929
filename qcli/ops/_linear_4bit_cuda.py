"""The CUDA kernels of `linear_4bit`: which one runs, and with what sizes."""

import torch

from qcli import codebooks
from qcli.ops._library import blocks, persistent_grid
from qcli.ops.dequantize_4bit import decoded_absmax
from qcli.ops.quantize_absmax import GROUP_SIZE
from qcli.runtime import cuda

_FEW = 8  # tokens of the first CUDA kernel
_few_cuda = cuda.kernel("linear_4bit", "pipppfpqiittp")
_batch_cuda = cuda.kernel("linear_4bit_batch", "pipppfpqiittpp")
_merge_cuda = cuda.kernel("linear_4bit_batch", "pipqqp", "merge_parts")
_CODE_BYTES = {quant_type: code.tobytes() for quant_type, code in codebooks.CODEBOOKS.items()}
_MAP_BYTES = codebooks.DYNAMIC_MAP.tobytes()
_TABLE = 256 * 32 * 4 + 256 * 4  # bytes of shared memory: the pair of values of every byte, and the map of double quantization


def run(
    x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point
) -> torch.Tensor | None:
    """The product, of the arguments of `linear_4bit`; None for a form that no kernel has.

    Scales that are not float32 are widened before: some percent of what the kernel reads. Zero points take their share apart, as a
    product of the sums of x over the blocks.
    """
    op, device, in_features = "linear_4bit", x.device, x.shape[-1]
    tokens = x.numel() // in_features if in_features else 0
    on_tensor_cores = compute_dtype == torch.float16 or (compute_dtype == torch.bfloat16 and cuda.capability(x) >= (8, 0))
    fits = block_size % 32 == 0 and in_features % block_size == 0
    batch = tokens > _FEW and block_size % 64 == 0 and cuda.capability(x) >= (8, 0) and _most(x, tokens)
    if not on_tensor_cores or not fits or not (0 < tokens <= _FEW or batch) or not out_features:
        return None
    if absmax.dtype != torch.uint8:
        absmax, nested_absmax = decoded_absmax(absmax, nested_absmax, offset, quant_type), None
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
    if zero_point is not None:
        offsets = (zero_point.float() * absmax).mul_(-1 / 8).view(out_features, -1)
        y = torch.addmm(y.float(), rows.float().unflatten(1, (-1, block_size)).sum(-1), offsets.t())
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
