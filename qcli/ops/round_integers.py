"""Integers in groups of a row: the scale and the zero point of each group, the codes, and what rounding cost.

Codes lie in [least, most], and the range of a group holds 0:
  symmetric    scale = max|w| / ((most - least) / 2)
  zero point   scale = (max - min) / (most - least),  zero_point = round(least - min / scale)
The scale is rounded to the dtype of x first, since that is what is stored. A scale of 0 becomes the eps of the dtype. A code is
round(w / scale) + zero_point, halves to even, clamped. It stands for (code - zero_point) * scale, a product in the dtype of the
scale (compressed-tensors).

A group with a NaN has the scale NaN, one with an infinity an infinite scale, and what is not a number then has the code 0.
"""

import torch

from qcli.ops._library import define
from qcli.ops._rounding import check_matrix, error_sums, rows_together, total
from qcli.runtime import cpu

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _find(groups, dtype, least, most, zero_point):
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = (high - low) / (most - least) if zero_point else torch.maximum(-low, high) / ((most - least) / 2)
    scale = scale.to(dtype)
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    scale = torch.where(scale.isnan(), torch.nan, scale)  # always the same one
    if not zero_point:
        return scale, None
    zero = (least - low / scale.float()).round_().clamp_(least, most).nan_to_num_(0.0)
    return scale, zero.to(torch.int8)


def _round(x, size, least, most, zero_point, scale, zero):
    groups = x.float().unflatten(-1, (-1, size))
    if scale is None:
        scale, zero = _find(groups, x.dtype, least, most, zero_point)
    codes = (groups / scale.float().unsqueeze(-1)).round_()
    if zero_point:
        codes += zero.unsqueeze(-1)
    codes = codes.clamp_(least, most).nan_to_num_(0.0).to(torch.int8)
    away = codes.to(torch.int16) - zero.unsqueeze(-1) if zero_point else codes
    stored = away.to(scale.dtype) * scale.unsqueeze(-1)
    return codes.flatten(-2), scale, zero, error_sums(x, stored.flatten(-2))


def _reference(
    x: torch.Tensor, size: int, least: int, most: int, zero_point: bool, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> _Results:
    _check(x, size, least, most, zero_point, scale, zero)
    if not len(x):
        return _fake(x, size, least, most, zero_point, scale, zero)
    together, parts = rows_together(x), []
    for first in range(0, len(x), together):
        here = slice(first, first + together)
        given = (None if part is None else part[here] for part in (scale, zero))
        parts.append(_round(x[here], size, least, most, zero_point, *given))
    codes, scales, zeros, sums = zip(*parts)
    found = torch.cat(zeros) if zero_point else x.new_empty((0, 0), dtype=torch.int8)
    return torch.cat(codes), torch.cat(scales), found, torch.stack(sums).sum(0)


def _fake(x, size, least, most, zero_point, scale, zero):
    groups = x.shape[1] // size
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty((x.shape[0], groups)),
        x.new_empty((x.shape[0], groups) if zero_point else (0, 0), dtype=torch.int8),
        x.new_zeros((3,), dtype=torch.float64),
    )


def _check(x, size, least, most, zero_point, scale, zero):
    op = "round_integers"
    check_matrix(op, x, size)
    if not -128 <= least < 0 < most <= 127:
        raise ValueError(f"{op}: codes lie in [{least}, {most}], expected a range within int8 that holds 0")
    if (zero is not None) != (scale is not None and zero_point):
        raise ValueError(f"{op}: zero points are given with scales, if there are any")
    shape = (x.shape[0], x.shape[1] // size)
    for name, given, dtype in (("scale", scale, x.dtype), ("zero", zero, torch.int8)):
        if given is not None and (tuple(given.shape) != shape or given.dtype != dtype):
            raise ValueError(f"{op}: {name} is {given.dtype} {tuple(given.shape)}, expected {dtype} {shape}")


_kernel = cpu.kernel("round_integers", "piqqqiiiifpppp")


def _cpu(
    x: torch.Tensor, size: int, least: int, most: int, zero_point: bool, scale: torch.Tensor | None, zero: torch.Tensor | None
) -> _Results:
    _check(x, size, least, most, zero_point, scale, zero)
    x = x.contiguous()
    codes, scales, zeros, _ = _fake(x, size, least, most, zero_point, scale, zero)
    if scale is not None:
        scales.copy_(scale)
    if zero is not None:
        zeros.copy_(zero)
    partial = torch.empty(len(x), 3, dtype=torch.float64)
    eps, code = torch.finfo(x.dtype).eps, cpu.DTYPES[x.dtype]
    _kernel(x, code, *x.shape, size, least, most, zero_point, scale is not None, eps, codes, scales, zeros, partial)
    return codes, scales, zeros, total(partial)


_op = define(
    "round_integers(Tensor x, int size, int least, int most, bool zero_point, Tensor? scale, Tensor? zero)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    _cpu,
)


def round_integers(
    x: torch.Tensor,
    size: int,
    least: int,
    most: int,
    zero_point: bool,
    scale: torch.Tensor | None = None,
    zero: torch.Tensor | None = None,
) -> _Results:
    """x [rows, columns], float32, bfloat16 or float16, in groups of `size` elements of a row, which divides columns. scale [rows,
    columns / size] of x's dtype, and with zero points zero int8 of that shape, take the place of what would be found.

    Returns codes int8 [rows, columns], scale [rows, columns / size] of x's dtype, zero points int8 of that shape, or [0, 0]
    without them, and sums float64 [3]: squared error, squared norm, and elements that are NaN or infinite. Those are in neither
    sum, nor are elements that are stored as such. Raises ValueError or TypeError for anything else.
    """
    return _op(x, size, least, most, zero_point, scale, zero)


def hostile(columns: int) -> torch.Tensor:
    """float32 [15, columns], a multiple of 16: what rounding meets at its limits."""
    x = torch.randn(15, columns, generator=torch.Generator().manual_seed(0))
    x[0] = 0
    x[1, 0], x[2, 1], x[3, 2] = torch.inf, -torch.inf, torch.inf
    x[4, :2] = torch.tensor([torch.inf, -torch.inf])
    x[5, :2] = torch.tensor([3e38, -3e38])
    x[6:10] *= torch.tensor([[1e-40], [1e-12], [1e12], [7e4]])
    x[10] = -0.0
    x[11] = x[11].abs() + 1
    x[12] = torch.arange(columns) % 16 / 2 - 4
    x[13] = 0.1
    x[14] = -x[14].abs()
    return x


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    forms = [(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, zero) for bits in (2, 3, 4, 8) for zero in (False, True)]
    for least, most, zero_point in [*forms, (-127, 127, False)]:
        options = {"least": least, "most": most, "zero_point": zero_point, "scale": None, "zero": None}
        name = f"{least}-{most}" + ("-zero" if zero_point else "")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for size, shape in ((32, (5, 96)), (70, (3, 70)), (128, (300, 256))):
                x = torch.randn(shape, generator=generator).to(dtype)
                yield f"{name}-{str(dtype)[6:]}-{size}-{'x'.join(map(str, shape))}", {"x": x, "size": size, **options}
            x = hostile(64).to(dtype)
            yield f"{name}-hostile-{str(dtype)[6:]}", {"x": x, "size": 16, **options}
            scale = (torch.randn(15, 2, generator=generator) / 10).to(dtype)
            scale[0, 1], scale[1, 1], scale[11, 0] = 0, torch.inf, 1e-8
            zero = torch.randint(least, most + 1, (15, 2), generator=generator).to(torch.int8) if zero_point else None
            yield f"{name}-given-{str(dtype)[6:]}", {"x": x, "size": 32, **options} | {"scale": scale, "zero": zero}
        yield f"{name}-empty", {"x": torch.empty(0, 64), "size": 32, **options}
