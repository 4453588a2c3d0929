"""What is read together, and that it makes no difference."""

import numpy as np
import pytest
import torch

import qcli
from qcli.corpus import read_windows
from qcli.evaluation import passes
from qcli.evaluation.passes import Form, Reading, score
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
    monkeypatch.setattr(passes, "BATCH_TOKENS", batch_tokens)
    skeleton = Skeleton(str(int8), device="cpu")
    windows = read_windows(skeleton.tokenizer, STORIES, tokens=500).windows
    assert len(windows) > 3
    _, [scores] = score(None, [Form("", Reading(skeleton, windows, lambda count, name: None))], windows)
    model, _ = qcli.load(str(int8), device="cpu")
    losses = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([window.ids])
            logits = model(ids).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    np.testing.assert_allclose(scores.loss, torch.cat(losses).numpy(), rtol=1e-9, atol=1e-12)
