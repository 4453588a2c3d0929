"""Each token's loss and divergence against torch's own in float64, whatever the chunks."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from qcli.evaluation import tokens
from qcli.evaluation.tokens import TokenScores, log_probabilities


@pytest.fixture
def logits():
    """(base's, model's, the tokens that came)."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70, 300, generator=generator) * 4
    other = base + torch.randn(70, 300, generator=generator) * torch.linspace(0, 1, 70)[:, None]
    return base, other, torch.randint(300, (70,), generator=generator)


def scored(base, other, targets, cuts):
    scores = TokenScores(len(targets), compared=True)
    for first, last in cuts:
        scores.add(first, other[first:last], targets[first:last], log_probabilities(base[first:last]))
    return scores


def test_equal_to_torch_in_float64(logits):
    base, other, targets = logits
    scores = scored(*logits, [(0, 70)])
    torch.testing.assert_close(
        torch.from_numpy(scores.loss), functional.cross_entropy(other.double(), targets, reduction="none"), rtol=1e-12, atol=0
    )
    p, q = base.double().log_softmax(1), other.double().log_softmax(1)
    expected = functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(torch.from_numpy(scores.divergence), expected, rtol=1e-12, atol=1e-14)
    assert scores.agrees.tolist() == (base.argmax(1) == other.argmax(1)).tolist() and 20 < scores.agrees.sum() < 70
    assert scores.divergence[0] == 0


@pytest.mark.parametrize("piece", [1, 1000, 1 << 21])
def test_any_chunks_in_any_order_give_the_same_to_the_bit(logits, monkeypatch, piece):
    whole = scored(*logits, [(0, 70)])
    monkeypatch.setattr(tokens, "_PIECE", piece)
    parts = scored(*logits, [(33, 70), (0, 1), (20, 33), (1, 20)])
    for name in ("loss", "divergence", "agrees"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))


def test_what_was_not_added_stays_unknown(logits):
    scores = scored(*logits, [(10, 20)])
    assert np.isnan(scores.loss[:10]).all() and np.isfinite(scores.loss[10:20]).all() and np.isnan(scores.loss[20:]).all()


def test_a_token_ruled_out_by_both_adds_nothing(logits):
    base, other, targets = logits
    blank = torch.full((70, 1), -torch.inf)
    wider = scored(torch.cat((base, blank), 1), torch.cat((other, blank), 1), targets, [(0, 70)])
    np.testing.assert_allclose(wider.divergence, scored(*logits, [(0, 70)]).divergence, rtol=1e-12, atol=1e-14)


def test_a_token_ruled_out_by_the_model_alone_is_infinitely_far(logits):
    base, other, targets = logits
    other = other.clone()
    other[3, 5] = -torch.inf
    scores = scored(base, other, targets, [(0, 70)])
    assert scores.divergence[3] == np.inf and np.isfinite(np.delete(scores.divergence, 3)).all()


def test_sixteen_bits_are_widened_first(logits):
    base, other, targets = (t.bfloat16() if t.is_floating_point() else t for t in logits)
    low, high = scored(base, other, targets, [(0, 70)]), scored(base.float(), other.float(), targets, [(0, 70)])
    assert np.array_equal(low.loss, high.loss) and np.array_equal(low.divergence, high.divergence)


def test_not_a_number_shows(logits):
    _, other, targets = logits
    other = other.clone()
    other[4, 17] = torch.nan
    scores = TokenScores(70)
    scores.add(0, other, targets)
    assert np.isnan(scores.loss).nonzero()[0].tolist() == [4] and scores.divergence is None


def test_parts_of_a_text_come_to_their_places(logits):
    """Four windows of 10, 25, 5 and 30 tokens, which two machines have scored."""
    base, other, targets = logits
    ends, parts = [0, 10, 35, 40, 70], []
    for numbers in ([1, 2], [0, 3]):
        rows = torch.cat([torch.arange(ends[i], ends[i + 1]) for i in numbers])
        parts.append((numbers, scored(base[rows], other[rows], targets[rows], [(0, len(rows))])))
    whole, placed = scored(*logits, [(0, 70)]), TokenScores.placed(parts, [10, 25, 5, 30])
    for name in ("loss", "divergence", "agrees"):
        np.testing.assert_array_equal(getattr(placed, name), getattr(whole, name))
