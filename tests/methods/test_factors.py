"""Factors of AWQ and SmoothQuant beside the formulas of the papers and of AutoAWQ, in float64."""

import pytest
import torch

from qcli import methods
from qcli.methods._factors import Inputs, awq_candidates, awq_scale, awq_weight_mean, smooth_scale
from qcli.methods._gptq import nearest, output_error
from qcli.methods.simulate import round_rows
from qcli.schemes import NAMED


def problem(rows=24, columns=256, tokens=300, seed=0):
    """Two weights, and activations of which some channels are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, ::37] *= 30
    weights = [torch.randn(rows, columns, generator=generator).to(torch.bfloat16) for _ in range(2)]
    return x, weights


def inputs_of(x) -> Inputs:
    return Inputs(x.abs().mean(0), x.abs().amax(0), x.square().mean(0), x, x.t() @ x)


def autoawq_scales(x_mean, w_mean, ratio, duo):
    """AutoAWQ 0.2.9, awq/quantize/quantizer.py, _compute_best_scale."""
    if duo:
        scales = (x_mean.pow(ratio) / (w_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
    else:
        scales = x_mean.pow(ratio).clamp(min=1e-4).view(-1)
    return scales / (scales.max() * scales.min()).sqrt()


def autoawq_weight_mean(weights, group_size):
    """The same file, _search_best_scale, step 1."""
    weight = torch.cat(weights, dim=0)
    shape = weight.shape
    weight = weight.view(-1, group_size)
    scale = weight.abs() / (weight.abs().amax(dim=1, keepdim=True) + 1e-6)
    return scale.view(shape).mean(0)


@pytest.mark.parametrize("duo", [False, True])
def test_the_grid_is_autoawqs(duo):
    x, weights = problem()
    x_mean, wide = x.abs().double().mean(0), [w.double() for w in weights]
    w_mean = awq_weight_mean(wide, 128)
    torch.testing.assert_close(w_mean, autoawq_weight_mean(wide, 128), rtol=1e-12, atol=0)
    for step in range(20):
        ours = awq_scale(x_mean, w_mean if duo else None, step / 20)
        torch.testing.assert_close(ours, autoawq_scales(x_mean, w_mean, step / 20, duo), rtol=1e-12, atol=0)
    if not duo:
        assert torch.equal(awq_scale(x_mean, None, 0.0), torch.ones_like(x_mean))


def test_every_step_of_the_grid_is_tried():
    x, weights = problem()
    candidates = awq_candidates(NAMED["awq"], inputs_of(x), weights, 20)
    assert [r for r, _ in candidates] == [*(step / 20 for step in range(1, 20)), *(step / 20 for step in range(20))]


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.85])
def test_smoothquants_formula(alpha):
    x, weights = problem()
    x_max, w_max = x.abs().double().amax(0), torch.cat(weights).double().abs().amax(0)
    torch.testing.assert_close(smooth_scale(x_max, w_max, alpha), x_max**alpha / w_max ** (1 - alpha), rtol=1e-12, atol=0)
    x_max[3] = 0  # a channel that no token reaches stays as it is
    assert smooth_scale(x_max, w_max, alpha)[3] == 1


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
@pytest.mark.parametrize("seed", range(3))
def test_never_worse_than_no_factors_by_its_own_measure(name, seed):
    x, weights = problem(seed=seed)
    if seed == 2:
        x = x.sign()  # nothing to gain: the weights decide
    method = methods.make(NAMED[name])
    found = method.factors(inputs_of(x), weights)
    assert found.error <= found.plain_error
    scale = torch.ones(x.shape[1]) if found.scale is None else found.scale
    total = plain = 0.0
    for weight in weights:
        wide = weight.float()
        for s in (scale, torch.ones_like(scale)):
            values = nearest(wide * s, method.grid((wide * s).bfloat16(), x.square().mean(0) / s.square(), 0.0)).values
            if name == "awq":
                error = output_error(wide, values / s, x.t() @ x)
            else:
                error = float((round_rows(x / s) @ values.t() - x @ wide.t()).square().sum())
            total, plain = (total + error, plain) if s is scale else (total, plain + error)
    assert total == pytest.approx(found.error, rel=1e-3) and plain == pytest.approx(found.plain_error, rel=1e-3)


def test_what_factors_gain_where_channels_are_large():
    x, weights = problem()
    for name, most in (("awq", 0.8), ("smoothquant", 0.2)):
        found = methods.make(NAMED[name]).factors(inputs_of(x), weights)
        assert found.error < most * found.plain_error
