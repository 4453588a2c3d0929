"""Small floats under scales of groups, rows or blocks: the scale of each, the codes, and what rounding cost.

  fp8      E4M3 (arXiv:2209.05433). scale = absmax / 448, rounded to the dtype of x; 0 becomes its eps. A code stands for
           code * scale, a product in that dtype
  mxfp4    E2M1 under powers of two (OCP Microscaling Formats 1.0). It stands for code * 2^(scale - 127) in float32
  nvfp4    E2M1 under scales in E4M3 of what `whole`, a float32 for the weight, leaves: scale = absmax / 6 * whole; 0 becomes E4M3's
           eps. It stands for code * (scale / whole) in float32
  nf3      a table of eight values (qcli/codebooks.py). scale = absmax. A code stands for table[code] * scale in float32
A code is the float nearest to w over what it is multiplied by, halves to even, clamped. A NaN has the code 0. Of nf3, halves take
the lower code, and a NaN has that of 0.
"""

import torch

from qcli import codebooks
from qcli.ops._library import blocks, define
from qcli.ops._rounding import check_matrix, error_sums, rows_together, total
from qcli.ops.round_integers import hostile
from qcli.runtime import cpu
from qcli.runtime.arguments import table

E2M1_MAX, E4M3_MAX = 6.0, 448.0
FORMS = ("fp8", "mxfp4", "nvfp4", "nf3")  # by their numbers in the kernel

# Midpoints of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6. Halfway the even code wins: below the second, fourth and sixth, at the
# rest.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TO_UPPER = (False, True, False, True, False, True, False)

_Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """The codes uint8 of float32 values: nearest magnitude, halves to even, clamped to 6; bit 3 is the sign. A NaN has the code
    0."""
    magnitudes = x.abs()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for midpoint, upper in zip(_MIDPOINTS, _TO_UPPER):
        codes += magnitudes >= midpoint if upper else magnitudes > midpoint
    return codes | (torch.signbit(x) & ~x.isnan()).to(torch.uint8) << 3


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """float32 values in E4M3, to nearest, clamped to its range. A NaN becomes 0."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).nan_to_num_(0.0).to(torch.float8_e4m3fn)


def mx_scales(largest: torch.Tensor) -> torch.Tensor:
    """E8M0 codes uint8 of groups whose absmax is `largest`, float32 (OCP Microscaling Formats 1.0, section 6.3; the absmax is first
    rounded to the mantissa of E2M1, so that it is never clamped far). 0 and values that are not finite have the code 127, a scale
    of 1."""
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent with 0.5 <= mantissa < 1
    exponent = exponent - 1 + (mantissa >= 0.875).to(exponent.dtype)
    codes = (exponent + 127 - 2).clamp_(0, 254)
    return torch.where((largest > 0) & largest.isfinite(), codes, 127).to(torch.uint8)


def nv_scales(largest: torch.Tensor, whole: torch.Tensor | float) -> torch.Tensor:
    """Scales in E4M3 of groups whose absmax is `largest`, float32, over the scale of the whole weight."""
    scale = to_e4m3(largest / E2M1_MAX * whole).float()
    return torch.where(scale == 0, torch.finfo(torch.float8_e4m3fn).eps, scale).to(torch.float8_e4m3fn)


def _e4m3(x: torch.Tensor, size: int, height: int, scale: torch.Tensor | None) -> _Results:
    wide = x.float()
    if scale is None:
        padded = torch.nn.functional.pad(wide.abs(), (0, -x.shape[1] % size, 0, -x.shape[0] % height))
        largest = padded.unflatten(0, (-1, height)).unflatten(-1, (-1, size)).amax((1, 3))
        scale = (largest / E4M3_MAX).to(x.dtype)
        scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
        scale = torch.where(scale.isnan(), torch.nan, scale)  # always the same one
        spread = scale.repeat_interleave(size, 1)[:, : x.shape[1]].repeat_interleave(height, 0)[: len(x)]
    else:
        spread = scale
    codes = to_e4m3(wide / spread.float())
    return codes, scale, error_sums(x, codes.to(x.dtype) * spread)


def _e2m1(x: torch.Tensor, form: str, size: int, whole: float) -> _Results:
    groups = x.float().unflatten(-1, (-1, size))
    largest = groups.abs().amax(-1)
    if form == "mxfp4":
        scale = mx_scales(largest)
        unit = torch.exp2(scale.float() - 127)
    else:
        scale = nv_scales(largest, whole)
        unit = scale.float() / whole
    codes = e2m1_codes(groups / unit.unsqueeze(-1))
    stored = table(codebooks.E2M1, x.device)[codes.int()] * unit.unsqueeze(-1)
    return codes.flatten(-2), scale, error_sums(x, stored.flatten(-2))


def _nf3(x: torch.Tensor, size: int, scale: torch.Tensor | None) -> _Results:
    groups = x.float().unflatten(-1, (-1, size))
    if scale is None:
        scale = groups.abs().amax(-1).to(x.dtype)
        scale = torch.where(scale.isnan(), torch.nan, scale)  # always the same one
    unit = scale.float().unsqueeze(-1)
    values = (groups / unit).nan_to_num_(0.0)
    codes = torch.bucketize(values, table(codebooks.NF3_THRESHOLDS, x.device), out_int32=True).to(torch.uint8)
    stored = table(codebooks.NF3, x.device)[codes.int()] * unit
    return codes.flatten(-2), scale, error_sums(x, stored.flatten(-2))


def _reference(x: torch.Tensor, form: str, size: int, height: int, whole: float, scale: torch.Tensor | None) -> _Results:
    _check(x, form, size, height, scale)
    if not x.numel():
        found = _fake(x, form, size, height, whole, scale)
        return found if scale is None else (found[0], scale.clone(), found[2])
    together, parts = rows_together(x, height), []
    for first in range(0, len(x), together):
        piece, given = x[first : first + together], scale if scale is None or form == "fp8" else scale[first : first + together]
        if form == "nf3":
            parts.append(_nf3(piece, size, given))
        else:
            parts.append(_e4m3(piece, size, height, given) if form == "fp8" else _e2m1(piece, form, size, whole))
    codes, scales, sums = zip(*parts)
    return torch.cat(codes), torch.cat(scales) if scale is None else scale.clone(), torch.stack(sums).sum(0)


def _fake(x, form, size, height, whole, scale):
    dtypes = {
        "fp8": (torch.float8_e4m3fn, x.dtype),
        "mxfp4": (torch.uint8, torch.uint8),
        "nvfp4": (torch.uint8, torch.float8_e4m3fn),
        "nf3": (torch.uint8, x.dtype),
    }
    codes, of_scale = dtypes[form]
    shape = (blocks(x.shape[0], height), blocks(x.shape[1], size)) if scale is None else scale.shape
    return x.new_empty(x.shape, dtype=codes), x.new_empty(shape, dtype=of_scale), x.new_zeros((3,), dtype=torch.float64)


def _check(x, form, size, height, scale):
    op = "round_floats"
    if form not in FORMS:
        raise ValueError(f"{op}: form is {form!r}, expected {', '.join(FORMS)}")
    check_matrix(op, x, size, divides=form != "fp8")
    if height < 1 or (height > 1 and form != "fp8"):
        raise ValueError(f"{op}: height is {height}, expected 1" + (" or more" if form == "fp8" else ""))
    given = {"fp8": (1, 1), "nf3": (x.shape[0], x.shape[1] // size)}
    if scale is not None and form not in given:
        raise ValueError(f"{op}: {form} with a scale, expected none, or one of {' and '.join(given)}")
    if scale is not None and (tuple(scale.shape) != given[form] or scale.dtype != x.dtype):
        raise ValueError(f"{op}: scale is {scale.dtype} {tuple(scale.shape)}, expected {x.dtype} {given[form]}")


_kernel = cpu.kernel("round_floats", "piiqqqqffippppp")


def _cpu(x: torch.Tensor, form: str, size: int, height: int, whole: float, scale: torch.Tensor | None) -> _Results:
    _check(x, form, size, height, scale)
    x = x.contiguous()
    codes, scales, _ = _fake(x, form, size, height, whole, scale)
    if scale is not None:
        scales.copy_(scale)
    partial = torch.empty(blocks(len(x), height), 3, dtype=torch.float64)
    code, eps, given = cpu.DTYPES[x.dtype], torch.finfo(x.dtype).eps, scale is not None
    tables = [table(each, x.device) if form == "nf3" else None for each in codebooks.NF3_OF_SIXTEEN]
    _kernel(x, code, FORMS.index(form), *x.shape, size, height, whole, eps, given, *tables, codes, scales, partial)
    return codes, scales, total(partial)


_op = define(
    "round_floats(Tensor x, str form, int size, int height, float whole, Tensor? scale) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    _cpu,
)


def round_floats(
    x: torch.Tensor, form: str, size: int, height: int = 1, whole: float = 1.0, scale: torch.Tensor | None = None
) -> _Results:
    """x [rows, columns], float32, bfloat16 or float16. form is "fp8", "mxfp4", "nvfp4" or "nf3".

    `height` rows and `size` columns share a scale. But for fp8 the height is 1 and size divides columns. `scale` of x's dtype takes
    the place of what would be found: under fp8 [1, 1] of all scales, under nf3 [rows, columns / size]. `whole` is that of nvfp4.

    Returns codes [rows, columns], float8_e4m3fn or uint8 in 0..15; scale [ceil(rows / height), ceil(columns / size)] of x's dtype,
    uint8 (E8M0) or float8_e4m3fn, or the one that was given; and sums float64 [3]: squared error, squared norm, and elements that
    are NaN or infinite. Those are in neither sum, nor are elements that are stored as such. Raises ValueError or TypeError for
    anything else.
    """
    return _op(x, form, size, height, whole, scale)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    forms = [
        ("fp8", 0, 1, 1.0),
        ("fp8", 128, 128, 1.0),
        ("mxfp4", 32, 1, 1.0),
        ("nvfp4", 16, 1, 500.0),
        ("nvfp4", 16, 1, torch.inf),
        ("nf3", 64, 1, 1.0),
    ]
    for form, size, height, whole in forms:
        name = f"{form}-{size}x{height}-{whole}"
        options = {"form": form, "height": height, "whole": whole, "scale": None}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            shapes = ((3, 70), (130, 300)) if form == "fp8" else ((3, 64), (300, 256))
            for shape in shapes:
                x = torch.randn(shape, generator=generator).to(dtype)
                yield f"{name}-{str(dtype)[6:]}-{'x'.join(map(str, shape))}", {"x": x, "size": size or shape[1], **options}
            x = hostile(64).to(dtype)
            yield f"{name}-hostile-{str(dtype)[6:]}", {"x": x, "size": size or 16, **options}
            steps = (torch.arange(-2048, 2048) / 256).view(16, 256).to(dtype)  # ties, and values below the normal ones
            yield f"{name}-steps-{str(dtype)[6:]}", {"x": steps, "size": size or 32, **options}
            if form == "fp8" and height == 1:
                for number, scale in enumerate((0.01, 1e-8, 0.0, torch.inf)):
                    given = torch.full((1, 1), scale, dtype=dtype)
                    yield f"{name}-given-{number}-{str(dtype)[6:]}", {"x": x, "size": 64, **options} | {"scale": given}
            if form == "nf3":
                given = torch.randn(15, 2, generator=generator).to(dtype)
                given[0, 1], given[1, 1], given[11, 0] = 0, torch.inf, 1e-8
                yield f"{name}-given-{str(dtype)[6:]}", {"x": x, "size": 32, **options} | {"scale": given}
        yield f"{name}-empty", {"x": torch.empty(0, 64), "size": size or 32, **options}
