"""LLM.int8() (arXiv:2208.07339, equation 8): an int8 product of the ordinary columns, a 16-bit product of the outlier columns.

  y = int32(q_x q_w^T) * absmax_x * absmax_w / 127^2  +  x[:, outliers] W[:, outliers]^T  +  bias

A column of x is an outlier if any of its |x| >= threshold in this call. A row's absmax excludes those elements. W's outlier
columns are its int8 columns, dequantized to x's dtype, as in bitsandbytes; nothing else is stored for them.

`fixed` columns are taken out of x first, whatever they hold in this call. For them the product is that of the unquantized weight,
as in the paper: x[:, fixed] original^T is added, with `original` rounded to x's dtype.

x has any float dtype. No value is cast to float16, the integer product is exact, sums are float32, and y is rounded once.
bitsandbytes casts x to float16 first, also rounds intermediate results to it, and its CPU constant exceeds 1/127^2 by 1.8e-5.
"""

import time
from functools import cache

import torch

from qcli.ops._int8_arguments import kernel_arguments
from qcli.ops._library import blocks, define, differentiate, persistent_grid, product_dtype
from qcli.ops._prepared_int8 import LONGEST, PreparedInt8
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.runtime import cpu, cuda

_EXACT_IN_FLOAT32 = 1024  # int8 products that float32 adds without rounding: 1024 * 128^2 = 2^24


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    fixed: torch.Tensor | None = None,
    original: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    q, absmax, outliers = quantize_int8(_without(rows, fixed), threshold)
    y = int8_product(q, weight).float()
    y.mul_((absmax * (1 / 127**2)).unsqueeze(1)).mul_(scale.float())
    columns = outliers.nonzero().view(-1)
    if columns.numel():
        kept = dequantize_int8(weight[:, columns], scale, x.dtype)
        y += rows[:, columns].float() @ kept.float().t()
    if fixed is not None and original is not None:
        y += rows[:, fixed].float() @ original.to(x.dtype).float().t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _without(rows: torch.Tensor, fixed: torch.Tensor | None) -> torch.Tensor:
    return rows if fixed is None else rows.index_fill(1, fixed.long(), 0.0)


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The exact int32 [M, N] product of a int8 [M, K] and b int8 [N, K] transposed. K must be below 2^17, or int32 overflows."""
    (m, k), n = a.shape, b.shape[0]
    if a.is_cuda and m and n and k:
        # cuBLASLt needs more than 16 rows, and multiples of 8 for the other two sizes.
        a = _pad(a, max(17 - m, 0), -k % 8)
        return torch._int_mm(a, _pad(b, -n % 8, -k % 8).t())[:m, :n]
    if a.is_cpu and m and n and k > 1 and _int_mm_pays():  # torch 2.13 misreads a matrix of one column
        return torch._int_mm(a, b.t())
    return _in_float32(a, b)


def _in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(_EXACT_IN_FLOAT32, 1), b.split(_EXACT_IN_FLOAT32, 1)):
        total += (left.float() @ right.float().t()).to(torch.int32)
    return total


def _pad(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


@cache
def _int_mm_pays() -> bool:
    """Whether torch's int8 product on this CPU is exact, and no slower than the product in float32.

    Without VNNI some versions saturate in int16, and others multiply one number after the other: on an EPYC with AVX2, 20 times
    slower than in float32. Both products give the same integers, so the measurement decides on the time alone.
    """
    return _int_mm_is_exact() and _int_mm_is_fast()


def _int_mm_is_fast() -> bool:
    a, b = (torch.ones(rows, 256, dtype=torch.int8, device="cpu") for rows in (64, 256))

    def seconds(product) -> float:
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            product()
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(lambda: torch._int_mm(a, b.t())) <= seconds(lambda: _in_float32(a, b))


def _int_mm_is_exact() -> bool:
    signs = torch.cat((torch.full((32, 256), 127, dtype=torch.int8), torch.full((32, 256), -127, dtype=torch.int8)))
    expected = 256 * 127**2 * torch.outer(signs[:, 0].int().sign(), signs[:, 0].int().sign())
    return all(torch.equal(torch._int_mm(signs[:m], signs.t()), expected[:m]) for m in (1, 64))


def _fake(x, weight, scale, bias, threshold, fixed=None, original=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_epilogue = cpu.kernel("linear_int8_epilogue", "ppqpqppip")


def _cpu(x, weight, scale, bias, threshold, fixed=None, original=None) -> torch.Tensor:
    in_features = x.shape[-1]
    if not in_features:
        return _reference(x, weight, scale, bias, threshold, fixed, original)
    prepared = PreparedInt8(in_features, weight, scale, bias, threshold, fixed, original)
    if x.numel() <= prepared.MOST_TOKENS * in_features:
        return prepared(x)
    rows = x.reshape(-1, in_features)
    q, absmax, outliers = quantize_int8(_without(rows, fixed), threshold)
    columns = outliers.nonzero().view(-1)
    kept = rows.index_select(1, columns if fixed is None else torch.cat((columns, fixed))).float()
    y = torch.empty(*x.shape[:-1], prepared.out_features, dtype=x.dtype)
    _epilogue(
        int8_product(q, weight),
        absmax,
        len(rows),
        prepared.address,
        columns.numel(),
        columns,
        kept,
        cpu.dtype_code("linear_int8", x),
        y,
    )
    return y


_FEW = 8  # the most tokens of the kernel that does everything in one launch
_few_cuda = cuda.kernel("linear_int8", "pipppqifppip")
_list_cuda = cuda.kernel("linear_int8_epilogue", "pipp", "list_outliers")
_gemm_cuda = cuda.kernel("linear_int8_gemm", "ppppppppqqippip")
_epilogue_cuda = cuda.kernel("linear_int8_epilogue", "ppppppppqqippip")


def _cuda(x, weight, scale, bias, threshold, fixed=None, original=None) -> torch.Tensor:
    op, device, (out_features, in_features) = "linear_int8", x.device, weight.shape
    if in_features >= LONGEST:
        raise ValueError(f"{op}: x has {in_features} columns, expected fewer than {LONGEST}: int32 sums would overflow")
    tokens = x.numel() // in_features if in_features else 0
    if not tokens or not out_features:
        return _reference(x, weight, scale, bias, threshold, fixed, original)
    constants, weight, scale, bias = kernel_arguments(op, x, weight, scale, bias)
    rows, apart = cuda.aligned(x.reshape(-1, in_features)), (0, 0, 0)
    if fixed is not None:
        fixed = cuda.require(op, "fixed", fixed, torch.int32, fixed.numel(), device)
        original = cuda.require(op, "original", original.to(x.dtype), x.dtype, out_features * fixed.numel(), device)
        apart = fixed, original, fixed.numel()
    y = x.new_empty((*x.shape[:-1], out_features))
    shared = _few_shared(tokens, in_features)
    if tokens <= _FEW and in_features % 16 == 0 and shared <= cuda.shared_memory(x) - 1024:
        grid = persistent_grid(x, blocks(out_features, 16), shared)
        _few_cuda(
            (*constants, f"FULL={int(in_features % 256 == 0)}"),
            grid,
            256,
            shared,
            rows,
            tokens,
            weight,
            scale,
            bias,
            out_features,
            in_features,
            threshold,
            *apart,
            y,
        )
        return y
    q, absmax, outliers = quantize_int8(_without(rows, fixed), threshold)
    found = count = 0
    if threshold > 0:
        found, count = (torch.empty(n, dtype=torch.int32, device=device) for n in (in_features, 1))
        _list_cuda(constants[:1], (1,), 1024, 0, outliers, in_features, found, count)
    rest = (bias, tokens, out_features, in_features, *apart, y)
    if _fuses(x, in_features):
        grid = (blocks(tokens, 128), blocks(out_features, 128))
        # Two blocks share a multiprocessor. They have four stages if its shared memory allows, else three.
        stages = 4 if 2 * (4 * 256 * 64 + 1024) <= cuda.shared_memory(x) else 3
        constants += (f"STAGES={stages}",)
        _gemm_cuda(constants, grid, 256, stages * 256 * 64, q, absmax, weight, scale, rows, found, count, *rest)
    else:
        product = int8_product(q, weight).contiguous()
        grid = (blocks(tokens, 32), blocks(out_features, 128))
        _epilogue_cuda(constants, grid, 256, 0, product, absmax, scale, rows, weight, found, count, *rest)
    return y


def _fuses(x: torch.Tensor, columns: int) -> bool:
    """Whether our own fused int8 product replaces cuBLAS's: if cuBLAS uses no faster instructions. On 9.0 cuBLAS does (wgmma). On
    later GPUs torch's product still uses the instructions of 8.0 (pytorch#187094)."""
    major, _ = capability = cuda.capability(x)
    return capability >= (8, 0) and major != 9 and x.dtype != torch.float32 and columns % 16 == 0


def _few_shared(tokens: int, columns: int) -> int:
    """Bytes of shared memory of linear_int8.cu: sums of products, sums of outliers, absmax, q, the masks of columns."""
    pitch = (columns + 63) // 128 * 128 + 64
    return 2 * 8 * 8 * 20 * 4 + 16 * 8 * 16 * 4 + 32 + 16 + tokens * pitch + 2 * blocks(columns, 32) * 4


_op = define(
    "linear_int8(Tensor x, Tensor weight, Tensor scale, Tensor? bias, float threshold, Tensor? fixed=None, Tensor? original=None)"
    " -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def _weight(x, weight, scale, bias, threshold, fixed=None, original=None):
    """The weight by which the gradient with respect to x is made."""
    found = dequantize_int8(weight, scale, product_dtype(x, x.dtype))
    return found if fixed is None else found.index_copy(1, fixed.long(), original.to(found.dtype))


def _rows(x, weight, scale, bias, threshold, fixed=None, original=None):
    """See differentiate."""

    def take(start: int, stop: int) -> tuple:
        kept = None if original is None else original[start:stop]
        return weight[start:stop], scale[start:stop], None, threshold, fixed, kept

    return 1, take


differentiate("linear_int8", _weight, _rows)


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    fixed: torch.Tensor | None = None,
    original: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] float; weight int8 [N, K]; scale float32 [N], the absmax of its rows; bias [N] or None. Returns [..., N] in x's
    dtype. fixed int32 [n] are distinct columns, from 0 to K - 1, which is not checked, and original [N, n] float are those columns
    of the unquantized weight; both or neither. Autograd differentiates with respect to x alone, as if x were not rounded."""
    return _op(x, weight, scale, bias, threshold, fixed, original)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (
        ((1, 848), 37),
        ((8, 1280), 20),
        ((130, 400), 140),
        ((20, 1040), 33),
        ((1, 128), 48),
        ((5, 70), 33),
        ((2, 65, 64), 16),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for threshold in (0.0, 6.0):
            for shape, out_features in shapes:
                weight, scale, _ = quantize_int8(torch.randn(out_features, shape[-1], generator=generator), 0.0)
                x = torch.randn(shape, generator=generator)
                x[..., 5] *= 30
                bias = torch.randn(out_features, generator=generator).to(dtype) if len(shape) > 2 else None
                name = f"{str(dtype)[6:]}-{threshold}-{'x'.join(map(str, shape))}x{out_features}"
                yield name, {"x": x.to(dtype), "weight": weight, "scale": scale, "bias": bias, "threshold": threshold}
    large = torch.randn(3, 64, generator=generator)
    large[:, 7] = 2e5
    large[1] = 0
    for threshold in (0.0, 6.0):
        arguments = {"x": large.bfloat16(), "weight": weight, "scale": scale, "bias": None}
        yield f"beyond-float16-{threshold}", {**arguments, "threshold": threshold}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for threshold, shape, out_features, count in (
            (0.0, (2, 848), 37, 40),
            (6.0, (3, 1280), 20, 24),
            (6.0, (130, 400), 140, 17),
        ):
            whole = torch.randn(out_features, shape[-1], generator=generator)
            weight, scale, _ = quantize_int8(whole, 0.0)
            x = torch.randn(shape, generator=generator)
            x[..., [5, 9]] *= 30
            fixed = torch.cat(
                (torch.tensor([5]), torch.randperm(shape[-1] - 10, generator=generator)[: count - 1].sort().values + 10)
            )
            arguments = {"x": x.to(dtype), "weight": weight, "scale": scale, "bias": None, "threshold": threshold}
            kept = {"fixed": fixed.int(), "original": whole[:, fixed].bfloat16()}
            yield f"fixed-{str(dtype)[6:]}-{threshold}-{'x'.join(map(str, shape))}x{out_features}", arguments | kept
