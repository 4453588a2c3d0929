"""Rotary position embedding of q and k, and the append of k and v to the cache. (RoFormer, Su et al., 2021, section 3.4)

  y = x cos + rotated(x) sin, for the first rot_dim values of a head; cos and sin are those of the token's position

  rotated(x)[i] = -x[i + rot_dim / 2] in the first half, x[i - rot_dim / 2] in the second       as in Llama
  rotated(x)[2 i] = -x[2 i + 1], rotated(x)[2 i + 1] = x[2 i]                                   interleaved, as in GPT-J

A row of an int8 cache is round(x / scale), ties to even, with scale = absmax / 127 of that head of that token. A row of zeros has
scale 0. So has none with NaN or infinity: its values are 0, its scale is NaN or infinity, and what reads it gets NaN.

The arithmetic is float32, and each result is rounded once. All implementations give the same bits.
"""

import torch

from qcli.ops._library import define
from qcli.ops._step import CACHE, Cache, start_of, token_rows, token_stride
from qcli.runtime import cpu, cuda

_OP = "rope_append"


def _rotated(x, cos, sin, interleaved):
    """x [tokens, heads, head_dim] in float32; cos and sin [tokens, rot_dim]."""
    rot_dim = cos.shape[-1]
    first, rest = x[..., :rot_dim], x[..., rot_dim:]
    if interleaved:
        turned = torch.stack((-first[..., 1::2], first[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-first[..., rot_dim // 2 :], first[..., : rot_dim // 2]), -1)
    return torch.cat((first * cos.unsqueeze(1) + turned * sin.unsqueeze(1), rest), -1)


def quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 values, float32 scales) of the rows of an int8 cache."""
    absmax = rows.abs().amax(-1)
    scale = absmax / torch.full_like(absmax, 127)  # on a GPU, torch multiplies by the reciprocal of a number
    usable = ((scale > 0) & scale.isfinite()).unsqueeze(-1)
    values = (rows / scale.unsqueeze(-1)).round().clamp(-127, 127)
    return torch.where(usable, values, 0).to(torch.int8), scale


def _reference(q, k, v, cos, sin, keys, values, key_scales, value_scales, start, interleaved):
    _check(q, k, v, cos, sin, Cache.checked(_OP, keys, values, key_scales, value_scales))
    positions = start + torch.arange(len(q), device=q.device)
    k = k.float()
    if cos is not None and cos.shape[-1]:
        cos, sin = cos[positions], sin[positions]
        q.copy_(_rotated(q.float(), cos, sin, interleaved))
        k = _rotated(k, cos, sin, interleaved)
    slots = positions % keys.shape[1]
    for rows, cache, scales in ((k, keys, key_scales), (v.float(), values, value_scales)):
        rows = rows.transpose(0, 1)
        if scales is None:
            cache[:, slots] = rows.to(cache.dtype)
        else:
            cache[:, slots], scales[:, slots] = quantized(rows)


def _fake(q, k, v, cos, sin, keys, values, key_scales, value_scales, start, interleaved):
    return None


def _check(q, k, v, cos, sin, cache: Cache) -> None:
    """Raises ValueError."""
    kv_heads, capacity, head_dim = cache.keys.shape
    for name, x, shape in (("q", q, (-1, head_dim)), ("k", k, (kv_heads, head_dim)), ("v", v, (kv_heads, cache.values.shape[2]))):
        if x.dim() != 3 or len(x) != len(q) or x.shape[2] != shape[1] or shape[0] not in (-1, x.shape[1]):
            wanted = [len(q), "heads" if shape[0] < 0 else shape[0], shape[1]]
            raise ValueError(f"{_OP}: {name} is {list(x.shape)}, expected {wanted}")
    if len(q) > capacity:
        raise ValueError(f"{_OP}: {len(q)} tokens, expected at most the cache's {capacity}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{_OP}: only one of cos and sin is given")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (table.dtype != torch.float32 or table.dim() != 2 or table.shape != cos.shape):
            raise ValueError(f"{_OP}: {name} is {table.dtype} {list(table.shape)}, expected float32 [positions, rot_dim], as cos")
        if table is not None and (table.shape[1] % 2 or table.shape[1] > head_dim):
            raise ValueError(f"{_OP}: rot_dim is {table.shape[1]}, expected an even number up to {head_dim}")


_kernel = cpu.kernel(_OP, "pqq")


def record(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    interleaved: bool = False,
) -> cpu.Record:
    """The record of the CPU kernel: struct RopeAppend of kernels/cpu/rope_append.cpp.

    q, k and v float32 as in the op, each with a stride between tokens. The cache is contiguous. A call for `tokens` tokens from the
    position `start` on needs start + tokens <= positions of the tables, and tokens <= capacity. Raises TypeError or ValueError.
    """
    cache = Cache.checked(_OP, keys, values, key_scales, value_scales)
    _check(q, k, v, cos, sin, cache)
    strides = [token_stride(_OP, name, x, *x.shape[1:]) for name, x in (("q", q), ("k", k), ("v", v))]
    rot_dim = 0 if cos is None else cos.shape[1]
    if cos is not None:
        cos, sin = (cpu.require(_OP, name, x, torch.float32, cos.numel()) for name, x in (("cos", cos), ("sin", sin)))
    tables = (cos, sin) if rot_dim else (None, None)
    return cpu.Record(f"ppppp{CACHE}qqqqqq", q, k, v, *tables, *cache.record(_OP), *strides, q.shape[1], rot_dim, interleaved)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    return x if token_rows(x) else x.contiguous()


def _cpu(q, k, v, cos, sin, keys, values, key_scales, value_scales, start, interleaved):
    _check(q, k, v, cos, sin, Cache.checked(_OP, keys, values, key_scales, value_scales))
    if not len(q):
        return
    first = int(start)
    last = first + len(q) - 1
    if first < 0 or (cos is not None and last >= len(cos)):
        rows = "0 or more" if cos is None else f"0 to {len(cos) - 1}, the rows of cos"
        raise ValueError(f"{_OP}: positions {first} to {last}, expected {rows}")
    wide, k, v = (_side_by_side(x.float()) for x in (q, k, v))
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    made = record(wide, k, v, cos, sin, keys, values, **scales, interleaved=interleaved)
    _kernel(made.address, len(q), first)
    if wide is not q:
        q.copy_(wide)


_kernel_cuda = cuda.kernel(_OP, "ppqpqpqppqiiiiiiqpppp")
_STORED = cuda.TYPES | {torch.int8: "int8_t"}


def _cuda(q, k, v, cos, sin, keys, values, key_scales, value_scales, start, interleaved):
    cache = Cache.checked(_OP, keys, values, key_scales, value_scales)
    _check(q, k, v, cos, sin, cache)
    device = q.device
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != device:
            raise ValueError(f"{_OP}: {name} is {x.dtype} on {x.device}, expected {q.dtype} on {device}")
    if keys.device != device:
        raise ValueError(f"{_OP}: keys are on {keys.device}, expected {device}")
    if not len(q):
        return
    constants = (f"DTYPE={cuda.type_name(_OP, q, 'q')}", f"STORED={_STORED[keys.dtype]}")
    rot_dim, positions = (0, 0) if cos is None else (cos.shape[1], len(cos))
    tables = (0, 0)
    if rot_dim:
        tables = tuple(cuda.require(_OP, name, x, torch.float32, cos.numel(), device) for name, x in (("cos", cos), ("sin", sin)))
    wide, k, v = map(_side_by_side, (q, k, v))
    (kv_heads, capacity, head_dim), v_dim, heads = keys.shape, values.shape[2], q.shape[1]
    grid, shared = (heads + 2 * kv_heads, len(q)), 4 * max(head_dim, v_dim)
    rows = (x for tensor in (wide, k, v) for x in (tensor, tensor.stride(0)))
    sizes = positions, rot_dim, interleaved, heads, kv_heads, head_dim, v_dim, capacity
    written = (0 if x is None else x for x in cache)
    _kernel_cuda(constants, grid, 32, shared, start_of(_OP, start, device), *rows, *tables, *sizes, *written)
    if wide is not q:
        q.copy_(wide)


_op = define(
    "rope_append(Tensor(a!) q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(b!) keys, Tensor(c!) values, "
    "Tensor(d!)? key_scales, Tensor(e!)? value_scales, Tensor start, bool interleaved) -> ()",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    start: torch.Tensor,
    interleaved: bool = False,
) -> None:
    """q [tokens, heads, head_dim], k [tokens, kv_heads, head_dim], v [tokens, kv_heads, v_dim], float32, bfloat16 or float16.

    cos and sin float32 [positions, rot_dim], each value given for each element, as transformers does; None: no rotation. keys
    [kv_heads, capacity, head_dim] and values [kv_heads, capacity, v_dim], contiguous, in float32, bfloat16, float16 or int8; int8
    needs key_scales and value_scales float32 [kv_heads, capacity]. start int64 [], the position of the first token. Position p is
    stored in slot p % capacity.

    Changes q, keys, values and the scales. Raises TypeError for a dtype of the cache, ValueError for sizes that do not fit.
    """
    _op(q, k, v, cos, sin, keys, values, key_scales, value_scales, start, interleaved)


def tables(positions: int, rot_dim: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin with the frequencies of RoFormer."""
    angles = torch.arange(positions).unsqueeze(1) / 10000.0 ** (torch.arange(0, rot_dim, 2) / max(rot_dim, 1))
    both = angles.repeat_interleave(2, 1) if interleaved else torch.cat((angles, angles), 1)
    return both.cos(), both.sin()


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    # tokens, heads, kv_heads, head_dim, v_dim, rot_dim, interleaved, capacity, start
    shapes = (
        (1, 9, 3, 64, 64, 64, False, 32, 20),
        (3, 4, 4, 20, 24, 8, True, 10, 9),
        (8, 2, 1, 96, 40, 48, False, 16, 300),
        (2, 3, 3, 80, 80, 80, True, 9, 0),
        (1, 2, 2, 16, 16, 0, False, 4, 5),
    )
    for number, stored in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.int8)):
        for tokens, heads, kv_heads, head_dim, v_dim, rot_dim, interleaved, capacity, start in shapes:
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(number + tokens) % 3]
            sizes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, v_dim))
            q, k, v = (torch.randn(tokens, *size, generator=generator).to(dtype) for size in sizes)
            cos, sin = tables(start + tokens, rot_dim, interleaved) if rot_dim else (None, None)
            scales = [torch.zeros(kv_heads, capacity) if stored == torch.int8 else None for _ in range(2)]
            yield (
                f"{str(dtype)[6:]}-{str(stored)[6:]}-{tokens}x{heads}x{head_dim}-{start}",
                {
                    "q": q,
                    "k": k,
                    "v": v,
                    "cos": cos,
                    "sin": sin,
                    "keys": torch.zeros(kv_heads, capacity, head_dim, dtype=stored),
                    "values": torch.zeros(kv_heads, capacity, v_dim, dtype=stored),
                    "key_scales": scales[0],
                    "value_scales": scales[1],
                    "start": torch.tensor(start),
                    "interleaved": interleaved,
                },
            )
