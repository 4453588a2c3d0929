"""GPTQ against direct solves of the same problem, in float64."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qcli import methods
from qcli.errors import NonFiniteError
from qcli.methods._gptq import factorized, gptq, nearest, output_error, refitted, row_errors
from qcli.methods._grid import Grid
from qcli.schemes import NAMED

FORMS = {
    "nf4": ("nf4", {}),
    "nf4-plain-32": ("nf4-plain", {"block_size": 32}),
    "fp4": ("fp4", {}),
    "rtn-4": ("rtn", {"group_size": 32}),
    "rtn-3-zero": ("rtn", {"bits": 3, "group_size": 64, "zero_point": True}),
    "rtn-2-row": ("rtn", {"bits": 2, "group_size": -1}),
    "nf3": ("nf3", {}),
    "hqq": ("hqq", {"group_size": 32}),
    "fp8": ("fp8", {}),
    "fp8-block": ("fp8", {"share": "block"}),
    "fp8-tensor": ("fp8", {"share": "tensor"}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
}


def problem(rows=24, columns=128, tokens=400, seed=0):
    """A weight, and the Hessian of correlated activations with some large channels."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixed
    x[:, ::17] *= 8
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16), x


def grid_of(name, weight, x):
    scheme, options = FORMS[name]
    method = methods.make(NAMED[scheme], options).by_texts()
    return method.grid(weight, x.square().mean(0), float(weight.abs().max())), method


def solved_directly(weight, hessian, grid, damping):
    """After each rounded column the least squares solution for all that are left, which is what GPTQ computes by a factor."""
    w, h = weight.double(), hessian.double()
    h = h + torch.diag(damping * h.diagonal() + 0.01 * damping * h.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    now, values = w.clone(), torch.zeros_like(w)
    for place, column in enumerate(order):
        _, value = grid.round(now[:, column].float(), column)
        values[:, column] = value.double()
        done, left = order[: place + 1], order[place + 1 :]
        if left:
            owed = (w[:, done] - values[:, done]) @ h[done][:, left]
            now[:, left] = w[:, left] + torch.linalg.solve(h[left][:, left], owed.t()).t()
    return values


@pytest.mark.parametrize("name", ["nf4", "rtn-4", "rtn-3-zero", "fp8"])
def test_it_is_the_direct_solution_column_by_column(name):
    weight, x = problem(rows=12, columns=64)
    grid, _ = grid_of(name, weight, x)
    hessian = x.t() @ x
    found = gptq(weight.float(), hessian, grid, factorized(hessian, 0.01))
    direct = solved_directly(weight.float(), hessian, grid, 0.01)
    same = (found.values.double() == direct).all(1)
    assert same.float().mean() > 0.8  # where a value is on a midpoint but for the last bit, float32 may take the other side
    assert output_error(weight.float(), found.values, hessian) <= 1.01 * output_error(weight.float(), direct.float(), hessian)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("columns", [128, 320, 200])
def test_no_row_is_worse_than_plain_rounding(name, columns):
    weight, x = problem(columns=columns)
    grid, _ = grid_of(name, weight, x)
    wide, hessian = weight.float(), x.t() @ x
    plain = nearest(wide, grid)
    found = gptq(wide, hessian, grid, factorized(hessian, 0.01))
    ours, theirs = (row_errors(wide, each.values, hessian) for each in (found, plain))
    assert (ours <= theirs).all()
    assert ours.sum() < 0.7 * theirs.sum()
    again = refitted(wide, hessian, found)
    assert row_errors(wide, again.values, hessian).sum() <= ours.sum()


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("columns", [128, 200])
def test_parts_decode_to_the_values(name, columns):
    """Through the decoder of the method, which knows nothing of grids. Groups do not divide 200 columns."""
    weight, x = problem(columns=columns)
    grid, method = grid_of(name, weight, x)
    found = refitted(weight.float(), x.t() @ x, gptq(weight.float(), x.t() @ x, grid, factorized(x.t() @ x, 0.01)))
    decoded = method.decode(found.grid.all_parts(found.codes), *weight.shape)
    torch.testing.assert_close(decoded, found.values, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("columns", [128, 200])
def test_nearest_is_the_method_itself(name, columns):
    """Without texts the grid gives the codes of the encoder that needs none."""
    weight, x = problem(columns=columns)
    scheme, options = FORMS[name]
    method = methods.make(NAMED[scheme], options)
    absmax = float(weight.abs().max())
    encoder = method.encoder(*weight.shape, torch.device("cpu"), absmax)
    parts = encoder.feed(weight.flatten(), 0)
    parts |= encoder.finish()[0]
    grid = method.grid(weight, None, absmax)
    ours = nearest(weight.float(), grid).values
    decoded = method.decode(parts, *weight.shape)
    different = ours != decoded
    if "nf4" in name or "fp4" in name[:3]:  # whose encoder takes v by another scale: the one before double quantization
        assert different.float().mean() < 0.01
    else:
        assert not different.any()


def test_blocks_that_straddle_rows():
    weight, x = problem(rows=10, columns=72)
    grid, method = grid_of("nf4", weight, x)
    assert grid.divides_rows
    found = gptq(weight.float(), x.t() @ x, grid, factorized(x.t() @ x, 0.01))
    assert refitted(weight.float(), x.t() @ x, found) is found
    decoded = method.decode(found.grid.all_parts(found.codes), *weight.shape)
    torch.testing.assert_close(decoded, found.values, rtol=0, atol=0)


def test_dead_channels_are_rounded_to_nearest():
    weight, x = problem()
    x[:, 5] = 0
    grid, _ = grid_of("rtn-4", weight, x)
    found = gptq(weight.float(), x.t() @ x, grid, factorized(x.t() @ x, 0.01))
    assert found.dead == 1
    assert torch.equal(found.values[:, 5], nearest(weight.float(), grid).values[:, 5])


def test_a_singular_hessian_takes_more_damping_and_says_so():
    """Fewer tokens than channels, and a damping far below what float64 can bear."""
    weight, x = problem(tokens=3)
    grid, _ = grid_of("nf4", weight, x)
    found = gptq(weight.float(), x.t() @ x, grid, factorized(x.t() @ x, 1e-18))
    assert found.damping > 1e-18
    with pytest.raises(NonFiniteError, match="positive definite"):
        factorized(torch.full((128, 128), torch.nan), 0.01)


def test_scales_refitted_are_the_least_squares_solution():
    """A row whose codes are exact for other scales: they are found."""
    weight, x = problem(rows=6, columns=64)
    method = methods.make(NAMED["nf4-plain"], {"block_size": 32})
    grid = method.grid(weight, None, 0.0)
    found = nearest(weight.float(), grid)
    truth = found.values * torch.tensor([1.07, 0.94]).repeat_interleave(32)
    again = refitted(truth, x.t() @ x, found)
    torch.testing.assert_close(again.values, truth, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name, bits, size, zero_point", [("sym", 4, 32, False), ("zero", 4, 64, True), ("three", 3, 32, False)])
def test_codes_are_those_of_llm_compressor(name, bits, size, zero_point):
    """gptq_llmcompressor.safetensors: weights, Hessians, scales and zero points, and what llm-compressor 0.14.0.1 made of them
    (quantize_weight, static order by activations, damping 0.01)."""
    stored = load_file(Path(__file__).with_name("gptq_llmcompressor.safetensors"))
    weight, hessian, scale, theirs = (stored[f"{name}.{key}"] for key in ("weight", "hessian", "scale", "values"))
    method = methods.make(NAMED["rtn"], {"bits": bits, "group_size": size, "zero_point": zero_point})
    zero = stored[f"{name}.zero_point"].float() if zero_point else None
    grid = Grid(method.scheme, scale, zero, size, {"scale": scale})
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))  # by a share of the mean, as it does
    found = gptq(weight, hessian, grid, factorized(damped, 0.0))
    kept = row_errors(weight, theirs, hessian) <= row_errors(weight, nearest(weight, grid).values, hessian)
    assert kept.float().mean() > 0.9  # in other rows plain rounding is better, and here they keep that
    torch.testing.assert_close(found.values[kept], theirs[kept], rtol=1e-6, atol=1e-6)


def test_importance_is_what_an_error_costs_once_it_is_made_up_for():
    """In the last column of the order, nothing is left to make up: its weight is E[x^2]. In others it is the variance that the
    later columns do not explain, by least squares in float64."""
    _, x = problem(columns=64, tokens=2000)
    hessian = x.t() @ x
    found = factorized(hessian, 1e-9)
    order, wide = found.order.tolist(), hessian.double()
    expected = torch.zeros(64, dtype=torch.float64)
    for place, column in enumerate(order):
        left = order[place + 1 :]
        explained = wide[column, left] @ torch.linalg.solve(wide[left][:, left], wide[left, column]) if left else 0.0
        expected[column] = wide[column, column] - explained
    torch.testing.assert_close(found.importance.double(), expected / expected.mean(), rtol=1e-3, atol=1e-6)
