"""Attention of a few tokens to the cache, which already holds their keys and values.

  s[p] = scale q . k[p]                                  then softcap tanh(s / softcap), if softcap is not 0 (Gemma 2, section 2)
  y    = sum_p exp(s[p]) v[p] / (sum_p exp(s[p]) + exp(sink))

p goes from max(0, position - window + 1) to the token's position; window 0 means all positions. A sink is one more logit per head,
in the denominator alone (gpt-oss). Query head h reads the key-value head h / (heads / kv_heads) (GQA, Ainslie et al., 2023).
Scores, weights and sums are float32. y is rounded once.
"""

import torch

from qcli.ops._library import blocks, define
from qcli.ops._step import CACHE, Cache, start_of, token_rows, token_stride, vector
from qcli.ops.rope_append import quantized
from qcli.runtime import cpu, cuda

_OP = "attend"


def _reference(q, keys, values, key_scales, value_scales, sinks, start, scale, softcap, window):
    _check(q, Cache.checked(_OP, *_contiguous(keys, values, key_scales, value_scales)), sinks, window)
    (tokens, heads, head_dim), (kv_heads, capacity, v_dim) = q.shape, values.shape
    positions = start + torch.arange(tokens, device=q.device)
    slots = torch.arange(capacity, device=q.device)
    last = start + tokens - 1
    stored = last - (last - slots) % capacity  # the latest position in each slot; negative if there was none
    seen = (stored >= 0) & (stored <= positions.unsqueeze(1))
    if window:
        seen &= stored > positions.unsqueeze(1) - window
    k, v = keys.float(), values.float()
    if key_scales is not None:
        k, v = k * key_scales.unsqueeze(-1), v * value_scales.unsqueeze(-1)
    v = torch.where(seen.any(0).view(1, -1, 1), v, 0)  # a slot that was never written may hold anything
    s = torch.einsum("tghd,gpd->tghp", q.float().view(tokens, kv_heads, -1, head_dim), k) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~seen.view(tokens, 1, 1, capacity), -torch.inf)
    if sinks is not None:
        sink = sinks.float().view(1, kv_heads, -1, 1).expand(tokens, -1, -1, -1)
        weights = torch.softmax(torch.cat((s, sink), -1), -1)[..., :-1]
    else:
        weights = torch.softmax(s, -1)
    return torch.einsum("tghp,gpd->tghd", weights, v).reshape(tokens, heads, v_dim).contiguous().to(q.dtype)


def _fake(q, keys, values, key_scales, value_scales, sinks, start, scale, softcap, window):
    return q.new_empty((*q.shape[:2], values.shape[2]))


def _check(q: torch.Tensor, cache: Cache, sinks: torch.Tensor | None, window: int) -> None:
    """Raises ValueError."""
    kv_heads, _, head_dim = cache.keys.shape
    if q.dim() != 3 or q.shape[2] != head_dim or not q.shape[1] or q.shape[1] % kv_heads:
        wanted = f"[tokens, heads, {head_dim}] with a multiple of {kv_heads} heads"
        raise ValueError(f"{_OP}: q is {list(q.shape)}, expected {wanted}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"{_OP}: sinks are {list(sinks.shape)}, expected [{q.shape[1]}]")
    if window < 0:
        raise ValueError(f"{_OP}: window is {window}, expected 0 or more")


_kernel = cpu.kernel(_OP, "pqq")


def record(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    y: torch.Tensor,
    *,
    scale: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> cpu.Record:
    """The record of the CPU kernel: struct Attend of kernels/cpu/attend.cpp.

    q [tokens, heads, head_dim] and y [tokens, heads, v_dim] float32, each with a stride between tokens; y is not q. sinks float32
    [heads]. The cache is contiguous. A call for `tokens` tokens from the position `start` on needs capacity >= start + tokens, or
    with a window capacity >= min(start + tokens, window + tokens - 1). Raises TypeError or ValueError.
    """
    cache = Cache.checked(_OP, keys, values, key_scales, value_scales)
    _check(q, cache, sinks, window)
    heads = q.shape[1]
    strides = [token_stride(_OP, "q", q, *q.shape[1:]), token_stride(_OP, "y", y, heads, values.shape[2])]
    sinks = vector(_OP, "sinks", sinks, heads)
    return cpu.Record(f"ppp{CACHE}qqqqff", q, sinks, y, *cache.record(_OP), *strides, heads, window, scale, softcap)


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _cpu(q, keys, values, key_scales, value_scales, sinks, start, scale, softcap, window):
    keys, values, key_scales, value_scales = _contiguous(keys, values, key_scales, value_scales)
    cache = Cache.checked(_OP, keys, values, key_scales, value_scales)
    _check(q, cache, sinks, window)
    tokens, first = len(q), int(start)
    y = torch.empty((*q.shape[:2], values.shape[2]), dtype=torch.float32)
    if not tokens:
        return y.to(q.dtype)
    needed = min(first + tokens, window + tokens - 1) if window else first + tokens
    if first < 0 or needed > cache.capacity:
        raise ValueError(f"{_OP}: start is {first}, and {needed} positions are needed; the cache has {cache.capacity}")
    wide = q.float()
    wide = wide if token_rows(wide) else wide.contiguous()
    options = {"key_scales": key_scales, "value_scales": value_scales, "sinks": None if sinks is None else sinks.float()}
    made = record(wide, keys, values, y, scale=scale, **options, softcap=softcap, window=window)
    _kernel(made.address, tokens, first)
    return y.to(q.dtype)


_STORED = cuda.TYPES | {torch.int8: "int8_t"}
_MOST_DIM = 256  # of a head in the CUDA kernel: 32 lanes of eight values
_kernel_cuda = cuda.kernel(_OP, "piiiiipiqppppiiffipp")
_merge_cuda = cuda.kernel(_OP, "ppiiipip", "merge_attention")


def _cuda(q, keys, values, key_scales, value_scales, sinks, start, scale, softcap, window):
    device, arguments = q.device, (q, keys, values, key_scales, value_scales, sinks, start, scale, softcap, window)
    cache = Cache.checked(_OP, *_contiguous(keys, values, key_scales, value_scales))
    _check(q, cache, sinks, window)
    (tokens, heads, head_dim), (kv_heads, capacity, v_dim) = q.shape, values.shape
    if not tokens or max(head_dim, v_dim) > _MOST_DIM:
        return _reference(*arguments)
    if keys.device != device:
        raise ValueError(f"{_OP}: keys are on {keys.device}, expected {device}")
    cuda.type_name(_OP, q, "q")
    q = q if token_rows(q) else q.contiguous()
    sinks = 0 if sinks is None else cuda.require(_OP, "sinks", sinks.float(), torch.float32, heads, device)
    queries = tokens * heads // kv_heads
    at_once = 1 if queries == 1 else 4
    lanes = max(8, 1 << (blocks(max(head_dim, v_dim), 8) - 1).bit_length())
    aligned = not (head_dim % 8 or v_dim % 8 or any(x.data_ptr() % 16 for x in cache[:2]))
    constants = (f"STORED={_STORED[keys.dtype]}", f"QUERIES={at_once}", *(() if aligned else ("ALIGNED=0",)))
    # Enough parts to fill the device, each with 128 positions or more when the cache is full.
    rest = kv_heads * blocks(queries, at_once)
    parts = max(1, min(blocks(capacity, 128), blocks(4 * cuda.multiprocessors(q), rest), 64))
    totals = q.new_empty((parts, tokens, heads, 2), dtype=torch.float32)
    partial = q.new_empty((parts, tokens, heads, v_dim), dtype=torch.float32)
    y, pointers = q.new_empty((tokens, heads, v_dim)), [0 if x is None else x for x in cache]
    sizes = tokens, heads, kv_heads, head_dim, v_dim
    of_q, options = (q, cpu.DTYPES[q.dtype], q.stride(0)), (capacity, lanes, scale, softcap, window)
    grid = parts, kv_heads, blocks(queries, at_once)
    _kernel_cuda(constants, grid, 128, 0, start_of(_OP, start, device), *sizes, *of_q, *pointers, *options, totals, partial)
    _merge_cuda(constants, (tokens * heads,), 128, 0, totals, partial, parts, heads, v_dim, sinks, cpu.DTYPES[q.dtype], y)
    return y


_op = define(
    "attend(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor? sinks, Tensor start, "
    "float scale, float softcap, int window) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    sinks: torch.Tensor | None,
    start: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """q [tokens, heads, head_dim], float32, bfloat16 or float16; the cache as in rope_append; sinks [heads] or None.

    start int64 [], the position of the first token. The cache holds position p in slot p % capacity. It must hold every position
    that is attended to: capacity >= start + tokens, or with a window capacity >= window + tokens - 1. Returns
    [tokens, heads, v_dim] in q's dtype. Raises TypeError for a dtype of the cache, ValueError for sizes that do not fit.
    """
    return _op(q, keys, values, key_scales, value_scales, sinks, start, scale, softcap, window)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    # tokens, heads, kv_heads, head_dim, v_dim, capacity, start, softcap, window, sinks
    shapes = (
        (1, 9, 3, 64, 64, 64, 40, 0.0, 0, False),
        (5, 8, 1, 80, 80, 30, 0, 0.0, 0, False),
        (8, 4, 4, 20, 24, 40, 100, 0.0, 33, True),
        (2, 6, 2, 96, 40, 600, 597, 20.0, 0, False),
        (3, 2, 2, 128, 128, 300, 1000, 30.0, 290, True),
    )
    for number, stored in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.int8)):
        for tokens, heads, kv_heads, head_dim, v_dim, capacity, start, softcap, window, sunk in shapes:
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(number + tokens) % 3]
            keys, values = (torch.randn(kv_heads, capacity, dim, generator=generator) for dim in (head_dim, v_dim))
            (keys, key_scales), (values, value_scales) = (
                quantized(x) if stored == torch.int8 else (x.to(stored), None) for x in (keys, values)
            )
            yield (
                f"{str(dtype)[6:]}-{str(stored)[6:]}-{tokens}x{heads}x{head_dim}-{start}",
                {
                    "q": torch.randn(tokens, heads, head_dim, generator=generator).to(dtype),
                    "keys": keys,
                    "values": values,
                    "key_scales": key_scales,
                    "value_scales": value_scales,
                    "sinks": torch.randn(heads, generator=generator) if sunk else None,
                    "start": torch.tensor(start),
                    "scale": head_dim**-0.5,
                    "softcap": softcap,
                    "window": window,
                },
            )
