"""HQQ against hqq 0.2.8's own result, whose codes, scales and zero points are in hqq.safetensors (groups of 64, its default
options)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcli.methods import make
from qcli.methods.hqq import levels, optimize
from qcli.methods.simulate import simulate
from qcli.schemes import NAMED

THEIRS = load_file(Path(__file__).with_name("hqq.safetensors"))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_codes_scales_and_zeros_are_those_of_hqq(bits):
    groups = THEIRS["weight"].view(-1, 64)
    inverse, zero = optimize(groups, bits, 20)
    assert torch.equal(levels(groups, inverse, zero, bits), THEIRS[f"b{bits}.codes"].float())
    assert torch.equal(1 / inverse, THEIRS[f"b{bits}.scale"])
    assert torch.equal(zero, THEIRS[f"b{bits}.zero"])


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rounding_the_zero_points_costs_little(bits):
    """What is stored, beside what hqq keeps: integers for floats."""
    weight = THEIRS["weight"]
    theirs = ((THEIRS[f"b{bits}.codes"].float() - THEIRS[f"b{bits}.zero"]) * THEIRS[f"b{bits}.scale"]).view(weight.shape)
    ours = simulate(make(NAMED["hqq"], {"bits": bits}), weight).weight
    assert (ours - weight).abs().mean() < 1.25 * (theirs - weight).abs().mean()


def test_a_large_weight_is_taken_in_pieces_that_do_not_depend_on_chunks():
    weight = torch.randn(300, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    method = make(NAMED["hqq"])
    whole = simulate(method, weight).weight
    encoder = method.encoder(*weight.shape, weight.device)
    rows = encoder.grain // 4096
    codes = {start: encoder.feed(weight[start : start + rows].reshape(-1), start * 4096)["codes"] for start in (rows * 2, 0, rows)}
    parts, _ = encoder.finish()
    decoded = method.decode(parts | {"codes": torch.cat([codes[start] for start in sorted(codes)])}, *weight.shape)
    assert rows == 128 and torch.equal(decoded, whole)
