"""Methods put in the place of linear layers, and what they are said to have done to weights and activations."""

import numpy as np
import pytest
import torch

from qcli.evaluation.methods import Methods, Rounded, Rounding
from qcli.methods import make
from qcli.methods.simulate import simulate
from qcli.schemes import NAMED, chosen
from qcli.streaming.skeleton import Skeleton
from tests.conftest import ROOT


def simulated(name, weight):
    return simulate(make(NAMED[name]), weight)


DEMO = str(ROOT / "examples/demo-model")


def decibels(values, rounded):
    return 10 * np.log10((values**2).sum() / ((values - rounded) ** 2).sum())


def test_activations_are_added_up_as_in_float64():
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randn(n, 96, generator=generator) * torch.linspace(0.1, 1, 96) for n in (40, 7, 130)]
    for x, column in zip(sequences, (5, 5, 60)):
        x[2, column] = -55.0
    prepared = simulated("int8", torch.randn(16, 96, generator=generator))
    rounding, pairs, ordinary = Rounding(), [], []
    for x in sequences:
        rounding.note("m", Rounded.of(x.unsqueeze(0), prepared))
        scale = 127 / x.abs().amax(1, keepdim=True).double().numpy()
        pair = x.double().numpy(), np.rint(x.double().numpy() * scale) / scale
        kept = (x.abs() < 6).all(0).numpy()
        assert kept.sum() == 95
        pairs.append([part.ravel() for part in pair])
        ordinary.append([part[:, kept].ravel() for part in pair])
    for sums, parts in ((rounding.activations, pairs), (rounding.ordinary, ordinary)):
        assert sums.sqnr == pytest.approx(decibels(*(np.concatenate(p) for p in zip(*parts))), abs=1e-4)
    assert rounding.outlier_columns("m") == 0


def test_columns_kept_in_any_sequence_count_once():
    prepared, rounding = simulated("llm-int8", torch.randn(16, 96)), Rounding()
    for columns in ([5], [5, 60], []):
        x = torch.rand(9, 96)
        x[3, columns] = 8.0
        rounding.note("m", Rounded.of(x.unsqueeze(0), prepared))
    assert rounding.outlier_columns("m") == 2 and rounding.outlier_columns("another") == 0


def test_layers_are_replaced_while_their_variant_passes_and_no_longer():
    skeleton = Skeleton(DEMO, dtype="float32", device="cpu")
    methods = Methods(skeleton, chosen("nf4-plain"))
    block = skeleton.blocks[2]
    skeleton.load(block)
    layers = {n: m for n, m in block.module.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(layers) == 7 and len(methods.linears) == 42
    x = torch.randn(1, 5, 128)
    whole = layers["mlp.up_proj"](x).detach()
    with torch.inference_mode(), methods.variant(block, "nf4-plain"):
        assert all("forward" in layer.__dict__ for layer in layers.values())
        rounded = layers["mlp.up_proj"](x)
    assert torch.equal(layers["mlp.up_proj"](x), whole) and not torch.equal(rounded, whole)
    weight = layers["mlp.up_proj"].weight
    assert torch.equal(rounded, simulated("nf4-plain", weight).linear(x))
    weights = [layer.weight.detach().double().numpy().ravel() for layer in layers.values()]
    stored = [simulated("nf4-plain", layer.weight.detach()).weight.double().numpy().ravel() for layer in layers.values()]
    expected = decibels(np.concatenate(weights), np.concatenate(stored))
    assert methods.roundings["nf4-plain"].weights.sqnr == pytest.approx(expected, abs=1e-4)
    assert methods.roundings["nf4-plain"].activations.sqnr is None and methods.roundings["unquantized"].weights.sqnr is None


def test_an_error_inside_leaves_the_layers_as_they_were():
    skeleton = Skeleton(DEMO, dtype="float32", device="cpu")
    methods, block = Methods(skeleton, chosen("fp4-plain")), skeleton.blocks[0]
    skeleton.load(block)
    with pytest.raises(ValueError), methods.variant(block, "fp4-plain"):
        raise ValueError
    assert not any("forward" in module.__dict__ for module in block.module.modules())


def test_projections_of_one_input_round_it_once():
    """And each counts it: what is summed up is that of every linear layer."""
    skeleton = Skeleton(DEMO, dtype="float32", device="cpu")
    methods, block = Methods(skeleton, chosen("int8")), skeleton.blocks[1]
    skeleton.load(block)
    attention, x, y = block.module.self_attn, torch.randn(1, 9, 128), torch.randn(1, 9, 128)
    with torch.inference_mode(), methods.variant(block, "int8"):
        attention.q_proj(x)
        once = methods.roundings["int8"].activations.sums.clone()
        rounded = methods._last[2]
        attention.k_proj(x)
        assert methods._last[2] is rounded
        attention.v_proj(y)
        assert methods._last[2] is not rounded
        block.module.mlp.gate_proj(y)
    sums = methods.roundings["int8"].activations.sums
    expected = 2 * once[0] + 2 * y.double().square().sum()
    assert sums[0].item() == pytest.approx(expected.item(), rel=1e-6) and methods._last is None
