"""The CUDA kernels of `linear_4bit`: which one runs, and with what sizes."""

import numpy as np
import torch

from qcli import codebooks
from qcli.ops._library import blocks, persistent_grid
from qcli.ops.quantize_absmax import GROUP_SIZE
from qcli.runtime import cuda

_FEW = 8  # tokens of the first CUDA kernel
_few_cuda = cuda.kernel("linear_4bit", "pipppfpqiittpp")
_batch_cuda = cuda.kernel("linear_4bit_batch", "pipppfpqiittppp")
_merge_cuda = cuda.kernel("linear_4bit_batch", "pipqqp", "merge_parts")
# Values as absmax multiplies them: 16 bits hold those that are kept in eighths, and their differences, exactly.
_CODE_BYTES = {name: (code * np.float32(codebooks.UNITS[name])).tobytes() for name, code in codebooks.CODEBOOKS.items()}
_MAPS = {torch.uint8: codebooks.DYNAMIC_MAP, torch.float8_e8m0fnu: codebooks.E8M0, torch.float8_e4m3fn: codebooks.E4M3}
_MAP_BYTES = {dtype: values.tobytes() for dtype, values in _MAPS.items()}
_NO_MAP = bytes(256 * 4)
_TABLE = 256 * 32 * 4 + 256 * 4  # bytes of shared memory: the pair of values of every byte, and the map of 8-bit scales
_FLOAT, _NESTED, _SAME, _SMALL = range(4)  # SCALES in linear_4bit.cuh


def _scales(absmax, nested_absmax, block_size, quant_type, compute_dtype, zero_point) -> int | None:
    """How kernels read absmax; None if none reads it. A 16-bit absmax of another dtype is widened first."""
    in_eighths = codebooks.UNITS[quant_type] != 1
    if absmax.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn):
        return _SMALL if block_size in (16, 32) and in_eighths and zero_point is None else None
    if block_size % 32 or (zero_point is not None and quant_type != "int4"):
        return None
    if absmax.dtype == torch.uint8 or nested_absmax is not None:
        return _NESTED if absmax.dtype == torch.uint8 and nested_absmax is not None and not in_eighths else None
    return _SAME if absmax.dtype == compute_dtype else _FLOAT


def run(
    x, packed, absmax, nested_absmax, offset, bias, block_size, quant_type, out_features, compute_dtype, zero_point
) -> torch.Tensor | None:
    """The product, of the arguments of `linear_4bit`; None for a form that no kernel has."""
    op, device, in_features = "linear_4bit", x.device, x.shape[-1]
    tokens = x.numel() // in_features if in_features else 0
    on_tensor_cores = compute_dtype == torch.float16 or (compute_dtype == torch.bfloat16 and cuda.capability(x) >= (8, 0))
    scales = _scales(absmax, nested_absmax, block_size, quant_type, compute_dtype, zero_point)
    chunk = 64 if scales == _SMALL or block_size % 64 == 0 else 32
    fits = in_features % block_size == 0 and in_features % chunk == 0
    batch = tokens > _FEW and chunk == 64 and cuda.capability(x) >= (8, 0) and _most(x, tokens)
    if scales is None or not on_tensor_cores or not fits or not (0 < tokens <= _FEW or batch) or not out_features:
        return None
    count = out_features * in_features // block_size
    packed = cuda.require(op, "packed", packed, torch.uint8, (out_features * in_features + 1) // 2, device)
    of_map = _MAP_BYTES.get(absmax.dtype, _NO_MAP)
    absmax = absmax.float() if scales == _FLOAT else absmax
    absmax = cuda.require(op, "absmax", absmax, absmax.dtype, count, device)
    if nested_absmax is not None:
        groups = blocks(count, GROUP_SIZE) if scales == _NESTED else 1
        nested_absmax = cuda.require(op, "nested_absmax", nested_absmax, torch.float32, groups, device)
    if zero_point is not None:
        zero_point = cuda.require(op, "zero_point", zero_point, torch.int8, count, device)
    if bias is not None:
        bias = cuda.require(op, "bias", bias.to(compute_dtype), compute_dtype, out_features, device)
    rows = cuda.aligned(x.reshape(-1, in_features).to(compute_dtype))
    y = rows.new_empty((tokens, out_features))
    constants: tuple[str, ...] = (f"DTYPE={cuda.TYPES[compute_dtype]}", f"CHUNK={chunk}", f"SCALES={scales}")
    if zero_point is not None:
        constants += ("ZERO=1",)
    arguments = (
        rows,
        tokens,
        packed,
        absmax,
        0 if nested_absmax is None else nested_absmax,
        offset,
        0 if bias is None else bias,
        out_features,
        in_features,
        block_size,
        _CODE_BYTES[quant_type],
        of_map,
        0 if zero_point is None else zero_point,
        y,
    )
    if tokens <= _FEW:
        shared = _TABLE + 2 * 8 * 20 * 8 * 4
        grid = persistent_grid(x, blocks(out_features, 16), shared)
        full = _full(scales, block_size, in_features, chunk)
        _few_cuda((*constants, f"FULL={full}"), grid, 256, shared, *arguments)
    else:
        _batch(x, y, constants, arguments, tokens)
    return y.to(x.dtype).view(*x.shape[:-1], out_features)


def _full(scales: int, block_size: int, in_features: int, chunk: int) -> int:
    """FULL of linear_4bit.cu."""
    if in_features % (4 * chunk):
        return 0
    if scales == _SMALL:
        return 1
    return block_size // chunk if block_size <= 2 * chunk else 0


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
