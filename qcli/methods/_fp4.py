"""Rounding activations to E2M1 in groups, as readers of `mxfp4` and `nvfp4` do."""

from __future__ import annotations

import torch

from qcli.ops.round_floats import e2m1_codes, mx_scales, nv_scales


def mx_rounds(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4: codes and scales of groups of `size` elements of rows, each with a power of two."""
    groups = rows.float().unflatten(-1, (-1, size))
    scale = mx_scales(groups.abs().amax(-1))
    return e2m1_codes(groups / torch.exp2(scale.float() - 127).unsqueeze(-1)).flatten(-2), scale


def nv_rounds(rows: torch.Tensor, size: int, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4: codes and scales of groups of `size` elements of rows, each with a scale in E4M3 of what `global_scale` float32 [1]
    leaves."""
    groups = rows.float().unflatten(-1, (-1, size))
    scale = nv_scales(groups.abs().amax(-1), global_scale)
    return e2m1_codes(groups / (scale.float() / global_scale).unsqueeze(-1)).flatten(-2), scale
