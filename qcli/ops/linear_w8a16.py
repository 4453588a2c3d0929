"""Linear layer with 8-bit weights and unquantized activations (W8A16). x is not rounded, so no column is an outlier.

  y = x ((q_w - zero_point) * scale)^T  +  bias

The weight is that of LLM.int8(), int8 with a row's absmax / 127 as its scale; or int8 or E4M3 with scales of rows or of groups. It
is read as it is stored. There is the error of the weight, but none of x. Sums are float32, a scale multiplies the sum of its
elements, and y is rounded once to x's dtype.
"""

import torch

from qcli.ops._int8_arguments import kernel_arguments
from qcli.ops._library import blocks, define, differentiate, persistent_grid, product_dtype
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.runtime import cpu, cuda

_ROWS = 512  # rows of the weight in float32 at a time
_PANEL_BYTES = 4 << 20  # of widened weight at a time, for many tokens on a CPU
_E4M3_UNIT = 256.0  # as in kernels/cpu/common.h


def _multiplier(scale: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What multiplies codes, [rows] or [rows, groups], and a number besides."""
    return (scale, 1 / 127) if scale.dim() == 1 else (scale, 1.0)


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int = 0,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).float()
    if group_size:
        parts = zip(weight.split(_ROWS), scale.split(_ROWS), (zero_point if zero_point is not None else scale).split(_ROWS))
        wide = (widened(w, s, group_size, None if zero_point is None else z) for w, s, z in parts)
        y = torch.cat([rows @ part.t() for part in wide], 1)
    else:
        y = torch.cat([rows @ part.float().t() for part in weight.split(_ROWS)], 1)
        multiplier, unit = _multiplier(scale)
        y.mul_(multiplier.view(-1).float() * unit)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def widened(
    weight: torch.Tensor, scale: torch.Tensor, group_size: int, zero_point: torch.Tensor | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values of codes [rows, K] in groups, with float32 scales [rows, groups], rounded once to `dtype`."""
    columns = weight.shape[1]
    wide = _e4m3_values(weight) if weight.dtype.is_floating_point else weight.float()
    if zero_point is not None:
        wide = wide - zero_point.float().repeat_interleave(group_size, 1)[:, :columns]
    if columns % group_size == 0:
        return (wide.unflatten(1, (-1, group_size)) * scale.unsqueeze(-1)).flatten(1).to(dtype)
    return (wide * scale.repeat_interleave(group_size, 1)[:, :columns]).to(dtype)


def _weight(x, weight, scale, bias, group_size, zero_point):
    """The weight in x's dtype, of the op's arguments."""
    of_groups = scale.float() if scale.dim() == 2 else scale.unsqueeze(1) * (1 / 127)
    return widened(weight, of_groups, group_size or max(1, x.shape[-1]), zero_point, x.dtype)


def _e4m3_values(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 in float32, by way of float16, whose bits are the same moved up by 7, but for the exponent's bias: torch's own
    conversion takes one after the other. Sign extension leaves the sign twice."""
    moved = (codes.view(torch.int8).to(torch.int16) << 7).bitwise_and_(-0x4001)
    return moved.view(torch.float16).float().mul_(_E4M3_UNIT)


def _fake(x, weight, scale, bias, group_size, zero_point):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_kernel = cpu.kernel("linear_w8a16", "piqpp")


class PreparedW8A16:
    """A weight, checked and prepared for the CPU kernel for few tokens. Its arguments after in_features are those of the op after
    x. It raises the same errors as the op."""

    MOST_TOKENS = 16  # for more tokens, torch's product of a widened weight is faster
    STEP = "linear_w8a16_step"

    def __init__(
        self,
        in_features: int,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        group_size: int = 0,
        zero_point: torch.Tensor | None = None,
    ):
        op, self.in_features, self.out_features = "linear_w8a16", in_features, weight.shape[0]
        _check(op, weight, scale, group_size, zero_point)
        is_float = weight.dtype == torch.float8_e4m3fn
        count = self.out_features * (blocks(in_features, group_size) if group_size else 1)
        weight = cpu.require(op, "weight", weight, weight.dtype, self.out_features * in_features)
        scale = cpu.require(op, "scale", scale.float(), torch.float32, count)
        if zero_point is not None:
            zero_point = cpu.require(op, "zero_point", zero_point, torch.int8, count)
        if bias is not None:
            bias = cpu.require(op, "bias", bias, bias.dtype, self.out_features)
        dtype = 0 if bias is None else cpu.dtype_code(op, bias, "bias")
        unit = _multiplier(scale)[1] * (_E4M3_UNIT if is_float else 1)
        sizes = self.out_features, in_features, group_size
        self.weight = cpu.Record("ppppqqqqif", weight, scale, zero_point, bias, dtype, *sizes, is_float, unit)
        self.addresses = self.weight.addresses

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        _kernel(x.contiguous(), cpu.dtype_code("linear_w8a16", x), tokens, self.weight.address, y)
        return y


def _check(op: str, weight: torch.Tensor, scale: torch.Tensor, group_size: int, zero_point: torch.Tensor | None) -> None:
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"{op}: weight is {weight.dtype}, expected int8 or float8_e4m3fn")
    if group_size < 0 or group_size % 16 or (group_size and scale.dim() != 2):
        raise ValueError(f"{op}: groups of {group_size} with scales of {scale.dim()} dimensions, expected multiples of 16 with 2")
    if zero_point is not None and not group_size:
        raise ValueError(f"{op}: zero points without groups")


def _cpu(x, weight, scale, bias, group_size, zero_point):
    in_features = x.shape[-1]
    if not in_features:
        return _reference(x, weight, scale, bias, group_size, zero_point)
    prepared = PreparedW8A16(in_features, weight, scale, bias, group_size, zero_point)
    if x.numel() <= PreparedW8A16.MOST_TOKENS * in_features:
        return prepared(x)
    rows = x.reshape(-1, in_features)
    return _by_panels(rows, weight, scale, bias, group_size, zero_point).view(*x.shape[:-1], len(weight))


def _by_panels(x, weight, scale, bias, group_size, zero_point):
    """Widens a few rows of the weight at a time. torch multiplies them while the cache still holds them."""
    coarse = x.is_cuda or (x.dtype == torch.bfloat16 and cpu.native_bfloat16())
    wide = x if coarse else x.float()
    scale = scale.float() if scale.dim() == 2 else scale.unsqueeze(1) * (1 / 127)
    y = x.new_empty(len(x), len(weight))
    step = max(1, _PANEL_BYTES // (x.shape[1] * wide.element_size()))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        zeros = None if zero_point is None else zero_point[part]
        panel = widened(weight[part], scale[part], group_size or x.shape[1], zeros, wide.dtype)
        some = None if bias is None else bias[part].to(wide.dtype)
        y[:, part] = torch.nn.functional.linear(wide, panel, some)
    return y


_FEW = 8  # the most tokens of the CUDA kernel
_CHUNK = 64  # columns: groups of the CUDA kernel are multiples
_kernel_cuda = cuda.kernel("linear_w8a16", "pipppfpqip")


def _cuda(x, weight, scale, bias, group_size=0, zero_point=None):
    op, (out_features, in_features) = "linear_w8a16", weight.shape
    _check(op, weight, scale, group_size, zero_point)
    is_float, tokens = weight.dtype == torch.float8_e4m3fn, x.numel() // in_features if in_features else 0
    if not tokens or not out_features:
        return _reference(x, weight, scale, bias, group_size, zero_point)
    on_tensor_cores = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and cuda.capability(x) >= (8, 0))
    fits = in_features % 16 == 0 and group_size % _CHUNK == 0 and not (is_float and zero_point is not None)
    if tokens > _FEW or not on_tensor_cores or not fits:
        return _widening(x, weight, scale, bias, group_size, zero_point)
    groups = blocks(in_features, group_size) if group_size else 1
    unit = _multiplier(scale)[1] * (_E4M3_UNIT if is_float else 1)
    constants, weight, scale, bias = kernel_arguments(op, x, weight.view(torch.int8), scale, bias, groups)
    constants += (f"FULL={int(in_features % 256 == 0)}",)
    if is_float:
        constants += ("E4M3=1",)
    if group_size:
        constants += (f"GROUP={group_size // _CHUNK}",)
    if zero_point is not None:
        constants += ("ZERO=1",)
        zero_point = cuda.require(op, "zero_point", zero_point, torch.int8, out_features * groups, x.device)
    y = x.new_empty((*x.shape[:-1], out_features))
    grid = persistent_grid(x, blocks(out_features, 16), 2 * 8 * 8 * 20 * 4)
    _kernel_cuda(
        constants,
        grid,
        256,
        0,
        cuda.aligned(x),
        tokens,
        weight,
        scale,
        0 if zero_point is None else zero_point,
        unit,
        bias,
        out_features,
        in_features,
        y,
    )
    return y


def _widening(x, weight, scale, bias, group_size, zero_point):
    """The product on CUDA where the kernel does not make it: torch multiplies a widened weight."""
    if scale.dim() == 2:
        rows = x.reshape(-1, x.shape[-1])
        return _by_panels(rows, weight, scale, bias, group_size, zero_point).view(*x.shape[:-1], len(weight))
    if x.dtype == torch.float32:
        return _reference(x, weight, scale, bias, group_size, zero_point)
    wide = dequantize_int8(weight, scale, x.dtype)
    return torch.nn.functional.linear(x, wide, None if bias is None else bias.to(x.dtype))


_op = define(
    "linear_w8a16(Tensor x, Tensor weight, Tensor scale, Tensor? bias, int group_size, Tensor? zero_point) -> Tensor",
    _reference,
    _fake,
    _cpu,
    _cuda,
)


def _rows(x, weight, scale, bias, group_size, zero_point):
    """See differentiate."""
    zeros = None if zero_point is None else zero_point.view(len(weight), -1)

    def take(start: int, stop: int) -> tuple:
        return weight[start:stop], scale[start:stop], None, group_size, None if zeros is None else zeros[start:stop]

    return 1, take


def _of_gradient(x, weight, scale, bias, group_size, zero_point):
    """The weight by which the gradient with respect to x is made."""
    return _weight(x.to(product_dtype(x, x.dtype)), weight, scale, bias, group_size, zero_point)


differentiate("linear_w8a16", _of_gradient, _rows)


def linear_w8a16(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int = 0,
    zero_point: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [..., K] float; weight [N, K], int8 or float8_e4m3fn; bias [N] or None. scale is float32: [N], the absmax of int8 rows;
    [N, 1], what multiplies the codes of a row; or [N, ceil(K / group_size)], of groups that are multiples of 16, beside which
    zero_point is int8 or None. Returns [..., N] in x's dtype. Raises ValueError for other forms. Autograd differentiates with
    respect to x alone."""
    return _op(x, weight, scale, bias, group_size, zero_point)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape, out_features in (((1, 128), 48), ((5, 70), 33), ((2, 65, 64), 16), ((3, 1040), 520)):
            weight, scale, _ = quantize_int8(torch.randn(out_features, shape[-1], generator=generator), 0.0)
            x = torch.randn(shape, generator=generator)
            x[..., 5] *= 30
            bias = torch.randn(out_features, generator=generator).to(dtype) if len(shape) > 2 else None
            name = f"{str(dtype)[6:]}-{'x'.join(map(str, shape))}x{out_features}"
            yield name, {"x": x.to(dtype), "weight": weight, "scale": scale, "bias": bias, "group_size": 0, "zero_point": None}
    large = torch.randn(3, 1040, generator=generator)
    large[:, 7] = 2e5
    large[1] = 0
    rest = {"bias": None, "group_size": 0, "zero_point": None}
    yield "beyond-float16", {"x": large.bfloat16(), "weight": weight, "scale": scale} | rest
    yield from _cases_of_groups(generator)


def _cases_of_groups(generator: torch.Generator):
    """int8 and E4M3 with scales of rows and of groups, with and without zero points, few tokens and many."""
    kinds = ((torch.int8, 32, True), (torch.int8, 64, True), (torch.int8, 128, False), (torch.float8_e4m3fn, 128, False))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for of_codes, size, with_zero in kinds:
            for shape, out_features in (((1, 256), 48), ((5, 200), 33), ((3, 2320), 40), ((8, 2304), 40), ((2, 17, 384), 40)):
                for group_size in (size, 0) if size == 128 else (size,):
                    count = blocks(shape[-1], group_size) if group_size else 1
                    weight = torch.randint(-127, 128, (out_features, shape[-1]), generator=generator)
                    zero_point = torch.randint(-128, 128, (out_features, count), generator=generator).to(torch.int8)
                    name = f"{str(dtype)[6:]}-{str(of_codes)[6:10]}-{group_size}-{'x'.join(map(str, shape))}x{out_features}"
                    yield (
                        name,
                        {
                            "x": torch.randn(shape, generator=generator).to(dtype),
                            "weight": weight.to(of_codes),
                            "scale": torch.rand(out_features, count, generator=generator) / 64,
                            "bias": torch.randn(out_features, generator=generator).to(dtype) if len(shape) > 2 else None,
                            "group_size": group_size,
                            "zero_point": zero_point if with_zero and group_size else None,
                        },
                    )
