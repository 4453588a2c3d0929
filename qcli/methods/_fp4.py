"""Rounding to E2M1 in groups: the encoders of `mxfp4` and `nvfp4`."""

from __future__ import annotations

import torch

from qcli.methods._groups import E2M1_MAX, Rounded, to_e4m3, whole_scale

# Midpoints of the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6. Halfway the even code wins: below the second, fourth and sixth, at the
# rest.
_MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_TO_UPPER = (False, True, False, True, False, True, False)


def e2m1_codes(x: torch.Tensor) -> torch.Tensor:
    """The codes uint8 of float32 values: nearest magnitude, halves to even, clamped to 6; bit 3 is the sign. A NaN has the code
    0."""
    magnitudes = x.abs()
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for midpoint, upper in zip(_MIDPOINTS, _TO_UPPER):
        codes += magnitudes >= midpoint if upper else magnitudes > midpoint
    return codes | (torch.signbit(x) & ~x.isnan()).to(torch.uint8) << 3


def mx_scales(largest: torch.Tensor) -> torch.Tensor:
    """E8M0 codes uint8 of groups whose absmax is `largest`, float32 (OCP Microscaling Formats 1.0, section 6.3; the absmax is first
    rounded to the mantissa of E2M1, so that it is never clamped far). 0 and values that are not finite have the code 127, a scale
    of 1."""
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa 2^exponent with 0.5 <= mantissa < 1
    exponent = exponent - 1 + (mantissa >= 0.875).to(exponent.dtype)
    codes = (exponent + 127 - 2).clamp_(0, 254)
    return torch.where((largest > 0) & largest.isfinite(), codes, 127).to(torch.uint8)


def mx_rounds(rows: torch.Tensor, size: int) -> Rounded:
    """MXFP4: groups of `size` elements of rows, each with a power of two."""
    groups = rows.float().unflatten(-1, (-1, size))
    scale = mx_scales(groups.abs().amax(-1))
    return Rounded(e2m1_codes(groups / torch.exp2(scale.float() - 127).unsqueeze(-1)).flatten(-2), scale)


def nv_rounds(rows: torch.Tensor, size: int, absmax: float = 0.0, global_scale: torch.Tensor | None = None) -> Rounded:
    """NVFP4: groups of `size` elements of rows, each with a scale in E4M3 of what the scale of the whole leaves: `global_scale`
    float32 [1], or the one for `absmax`."""
    groups = rows.float().unflatten(-1, (-1, size))
    whole = whole_scale(absmax).to(rows.device) if global_scale is None else global_scale
    scale = to_e4m3(groups.abs().amax(-1) / E2M1_MAX * whole)
    scale = torch.where(scale.float() == 0, torch.finfo(torch.float8_e4m3fn).eps, scale.float()).to(torch.float8_e4m3fn)
    return Rounded(e2m1_codes(groups / (scale.float() / whole).unsqueeze(-1)).flatten(-2), scale)
