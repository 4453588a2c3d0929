"""What is read together, and that it makes no difference."""

import numpy as np
import pytest
import torch

import qcli
from qcli.evaluation.score import Contender, pieces_of, score
from qcli.streaming import reading
from qcli.streaming.corpus import Window, read_windows
from qcli.streaming.reading import Reading
from qcli.streaming.skeleton import Skeleton
from tests.conftest import ROOT

STORIES = ROOT / "examples/stories.jsonl"


@pytest.fixture(scope="module")
def int8(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes") / "int8"
    qcli.quantize(str(ROOT / "examples/demo-model"), folder, bits=8)
    return folder


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_a_model_in_8_bits_reads_each_window_as_if_alone(int8, monkeypatch, batch_tokens):
    """Which columns LLM.int8() keeps in 16 bits depends on all tokens of a call."""
    monkeypatch.setattr(reading, "BATCH_TOKENS", batch_tokens)
    skeleton = Skeleton(str(int8), device="cpu")
    windows = read_windows(skeleton.tokenizer, STORIES, tokens=500).windows
    assert len(windows) > 3
    _, [scores] = score(None, [Contender("", Reading(skeleton, windows, lambda count, name: None))], windows)
    model, _ = qcli.load(str(int8), device="cpu")
    losses = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window.ids])
            logits = model(ids).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    np.testing.assert_allclose(scores.loss, torch.cat(losses).numpy(), rtol=1e-9, atol=1e-12)


def test_pieces_are_all_scored_tokens_a_few_at_a_time():
    windows = [Window(tuple(range(10, 10 + n)), context, 0) for n, context in ((9, 1), (4, 2), (2, 1), (12, 5))]
    expected = [(i, at, w.ids[at + 1]) for i, w in enumerate(windows) for at in range(w.context - 1, len(w.ids) - 1)]
    for rows in (1, 5, 8, 1000):
        groups = list(pieces_of(windows, rows))
        sizes = [sum(len(piece.ids) for piece in group) for group in groups]
        assert sizes[:-1] == [rows] * (len(sizes) - 1) and 0 < sizes[-1] <= rows
        pieces = [piece for group in groups for piece in group]
        found = [(p.window, p.first + i, token) for p in pieces for i, token in enumerate(p.ids.tolist())]
        assert found == expected and [p.window for p in pieces if p.last] == [0, 1, 2, 3]
