"""What machines measured with parts of a text, added up in any order, against one that measured the whole: the same bits."""

import pickle
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from qcli.ops.activation_stats import FIELDS
from qcli.outliers.attention import LayerAttention
from qcli.outliers.damage import Damage
from qcli.outliers.measured import DIMS_KEPT, LayerMeasure, Measured, SiteMeasure
from qcli.outliers.spikes import Massive, Spike, SuperWeight
from qcli.outliers.statistics import ChannelHistograms, ChannelStats, OutlierSketch
from qcli.outliers.sums import WideSum

THRESHOLD, CHANNELS = 6.0, 24
DIVISIONS = [[[0, 1, 2], [3, 4, 5, 6]], [[6, 5, 4], [3, 2, 1, 0]], [[2], [5, 0], [6], [1, 3, 4]], [[i] for i in range(7)]]


@pytest.fixture(scope="module")
def batches():
    """Seven batches, float32 [rows, 24], of channels of many magnitudes; the last has no outliers."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(rows, CHANNELS, generator=generator) for rows in (50, 1, 33, 64, 7, 90, 20)]
    for x in found[:-1]:
        x *= 1.7 ** torch.arange(-5, CHANNELS - 5)
        x[:, 0] += 1e6
    found[-1].clamp_(-1, 1)
    return found


def whole_and_merged(make, add):
    """(one that was given batches 0 to 6, others that were merged of parts): `add(one, i)` gives it batch i."""

    def given(numbers):
        one = make()
        for i in numbers:
            add(one, i)
        return one

    merged = []
    for division in DIVISIONS:
        first, *others = [pickle.loads(pickle.dumps(given(part))) for part in division]
        for other in others:
            first.merge(other)
        merged.append(first)
    return given(range(7)), merged


def test_wide_sums_are_exact_to_one_rounding():
    rng = random.Random(0)
    terms = [[rng.uniform(-1, 1) * 10 ** rng.randint(-12, 12) for _ in range(3)] for _ in range(200)]
    exact = [float(sum(map(Fraction, column))) for column in zip(*terms)]
    for seed in range(20):
        order = random.Random(seed).sample(terms, len(terms))
        sums = [WideSum(3), WideSum(3), WideSum(3)]
        for term in order:
            rng.choice(sums).add(torch.tensor(term, dtype=torch.float64))
        sums[1].merge(sums[0])
        sums[2].merge(sums[1])
        assert sums[2].value.tolist() == exact
    plain = {sum(term[0] for term in random.Random(seed).sample(terms, len(terms))) for seed in range(20)}
    assert len(plain) > 1  # in a plain sum the order shows


def test_channel_stats(batches):
    whole, merged = whole_and_merged(lambda: ChannelStats(CHANNELS), lambda stats, i: stats.add(batches[i], THRESHOLD))
    wide = torch.cat(batches).double().numpy()
    np.testing.assert_allclose(whole["sum_fourths"], (wide**4).sum(0), rtol=1e-12)
    for stats in merged:
        assert stats.rows == whole.rows == len(wide)
        assert all(torch.equal(stats[field], whole[field]) for field in FIELDS)


def test_sketches_and_histograms(batches):
    whole, merged = whole_and_merged(lambda: OutlierSketch(THRESHOLD), lambda sketch, i: sketch.add(batches[i]))
    assert len(whole.channels()) > DIMS_KEPT
    for sketch in merged:
        assert sketch.channels() == whole.channels()
        for channel in whole.channels():
            assert all(map(torch.equal, sketch.of(channel), whole.of(channel)))
    whole, merged = whole_and_merged(lambda: ChannelHistograms(CHANNELS), lambda histograms, i: histograms.add(batches[i]))
    for histograms in (whole, *merged):
        histograms.keep([0, 7, 23])
        assert all(histograms.of(channel) == whole.of(channel) for channel in (0, 7, 23))
        assert sum(histograms.of(7)[1]) == sum(map(len, batches))


def test_damage(batches):
    def add(damage, i):
        damage.add((batches[i], batches[i][:, 2:]), (batches[i].round(), batches[i][:, 2:].round()))

    whole, merged = whole_and_merged(Damage, add)
    x = torch.cat(batches).double()
    assert whole.output == pytest.approx(10 * (x.square().sum() / (x - x.round()).square().sum()).log10().item(), rel=1e-6)
    assert whole.ordinary != whole.output
    assert all((damage.output, damage.ordinary) == (whole.output, whole.ordinary) for damage in merged)


def test_attention(batches):
    probabilities = [batch.softmax(1) for batch in batches]

    def add(attention, i):
        if i == 6:  # its block shows none
            return
        attention.rows += len(probabilities[i])
        attention.add_top1("with", probabilities[i].amax(1))
        attention.add_first(probabilities[i])

    whole, merged = whole_and_merged(lambda: LayerAttention(["with"]), add)
    seen = torch.cat(probabilities[:6]).double()
    assert whole.mean_top1("with") == pytest.approx(seen.amax(1).mean().item(), rel=1e-12)
    assert whole.sinks == (int((seen.mean(0) > 0.3).sum()), CHANNELS) and whole.sinks[0] > 0
    assert all(
        (a.rows, a.queries, a.top1("with"), a.sinks) == (whole.rows, whole.queries, whole.top1("with"), whole.sinks) for a in merged
    )


def site(batches, i, group="mlp", order=0, kind="ffn input") -> SiteMeasure:
    """What batch i alone left at a site."""
    x = batches[i]
    found = SiteMeasure((group, order), (-len(x), i, order), ChannelStats(CHANNELS), OutlierSketch(THRESHOLD), kind)
    found.modules = [f"{group}.up_proj"]
    found.stats.add(x, THRESHOLD)
    found.bos = ChannelStats(CHANNELS)
    found.bos.add(x[:1], THRESHOLD)
    found.sketch.add(x)
    found.token_absmax = [x.abs().amax(1)]
    found.histograms = ChannelHistograms(CHANNELS)
    found.histograms.add(x)
    found.surface = x[:5] if i == 0 else None
    if i in (1, 4):  # sampled windows
        found.damage = {"int8": Damage()}
        found.damage["int8"].add((x, x), (x.round(), x.round()))
        found.columns_kept = {i: i / 10}
    return found


def measured(batches, i) -> Measured:
    """What batch i alone left at two blocks. Only some batches meet an expert, and only some a spike."""
    layers = []
    for index in (3, 5):
        sites = [site(batches, i)] + ([site(batches, i, "expert", 1, "other")] if i in (2, 3) else [])
        weight = SuperWeight(index, "mlp.down_proj", i, i, 1.0, 2.0, 3.0)
        spikes = {"mlp.down_proj": Spike(float(i % 3 == 2), (-len(batches[i]), i), (weight,))} if i != 6 else {}
        massive = {i: [Massive(i, 0, 1, 200.0 + i, 0.1)] if i % 2 else []}
        residual = site(batches, i, "", 0, "residual stream")
        layers.append(LayerMeasure(index, f"layers.{index}", sites, residual, {i: i / 7}, massive, spikes))
    mask = batches[i].abs() >= THRESHOLD
    return Measured(layers, mask.sum(0), len(mask))


@pytest.mark.parametrize("order", [range(7), [6, 5, 4, 3, 2, 1, 0], [3, 6, 0, 5, 2, 1, 4]], ids=str)
def test_blocks(batches, order):
    first, *others = [measured(batches, i) for i in order]
    for other in others:
        first.merge(other)
    first.settle()
    everything = torch.cat(batches)
    assert torch.equal(first.affected, (everything.abs() >= THRESHOLD).sum(0)) and first.positions == len(everything)
    assert [layer.name for layer in first.layers] == ["layers.3", "layers.5"]
    for layer in first.layers:
        assert [s.key for s in layer.sites] == [("mlp", 0), ("expert", 1)]
        mlp, expert = layer.sites
        assert mlp.stats.rows == len(everything) and expert.stats.rows == len(batches[2]) + len(batches[3])
        assert mlp.bos.rows == 7 and torch.equal(mlp.surface, batches[0][:5])
        assert torch.equal(torch.cat(mlp.token_absmax).sort()[0], everything.abs().amax(1).sort()[0])
        count = (everything.abs() >= THRESHOLD).sum(0)
        assert mlp.dims[0] == int(count.argmax()) and all(dim in mlp.histograms for dim in mlp.dims[:DIMS_KEPT])
        assert mlp.dims[DIMS_KEPT] not in mlp.histograms
        assert mlp.share_kept == pytest.approx(0.25) and expert.share_kept is None
        both = torch.cat((batches[1], batches[4])).double()
        error = (both - both.round()).square().sum()
        assert mlp.damage["int8"].output == pytest.approx(10 * (both.square().sum() / error).log10().item(), rel=1e-6)
        assert sorted(layer.medians.values()) == [i / 7 for i in range(7)]
        assert [m.window for m in layer.massive_activations] == [1, 3, 5]
        # Batches 2 and 5 have spikes of one height, and 5 is the longer one, which a machine reads first.
        assert [w.row for w in layer.super_weights] == [5]
        assert layer.residual.stats.rows == len(everything)
