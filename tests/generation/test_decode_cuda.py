"""How a step is captured on CUDA: against a torch.cuda that only takes notes, and on a GPU where there is one."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import qcli
from qcli.generation import decode
from qcli.generation import graph as decode_graph
from qcli.generation import step as decode_step
from qcli.generation.op_step import OpStep
from tests.captures import CASES, GREEDY, SAMPLED, ours, small, theirs
from tests.conftest import ROOT
from tests.generation.test_op_step import ours as by_ops
from tests.lean_models import MODELS, prompt_of
from tests.lean_models import small as layered

DEMO = ROOT / "examples" / "demo-model"


class FakeCuda:
    """What a capture asks of torch.cuda, in the order in which it does."""

    def __init__(self, monkeypatch):
        self.said, self.mode = [], 0
        names = ("device", "stream", "graph", "Stream", "CUDAGraph", "current_stream", "get_sync_debug_mode")
        for name in (*names, "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    @contextmanager
    def _within(self, name):
        self.said.append(f"+{name}")
        yield
        self.said.append(f"-{name}")

    def device(self, device):
        return self._within("device")

    def stream(self, stream):
        return self._within("stream")

    def graph(self, graph, stream):
        return self._within("graph")

    def Stream(self, device=None):
        return SimpleNamespace(wait_stream=lambda other: self.said.append("side waits"))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.said.append("main waits"))

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.said.append("replay"))

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode


def test_a_capture_rehearses_twice_on_the_side(monkeypatch):
    """Once to load kernels, once with torch refusing to wait; what is captured runs on the same stream."""
    cuda, modes = FakeCuda(monkeypatch), []
    capture = decode_graph._cuda_capture(torch.device("cuda", 0), torch.cuda.Stream())
    replay = capture(lambda: (cuda.said.append("rehearse"), modes.append(cuda.mode)), lambda: cuda.said.append("step"))
    replay()
    assert modes == [0, "error"] and cuda.mode == 0
    assert cuda.said == [
        "+device",
        "side waits",
        "+stream",
        "rehearse",
        "rehearse",
        "-stream",
        "main waits",
        "+graph",
        "step",
        "-graph",
        "-device",
        "replay",
    ]


def test_a_rehearsal_that_waits_leaves_torch_as_it_was(monkeypatch):
    cuda = FakeCuda(monkeypatch)

    def rehearse():
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError):
        decode_graph._cuda_capture(torch.device("cuda", 0), torch.cuda.Stream())(rehearse, lambda: None)
    assert cuda.mode == 0 and "+graph" not in cuda.said


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@GPU
@pytest.mark.parametrize("name", CASES)
def test_a_cuda_graph_says_what_transformers_says(name, monkeypatch):
    monkeypatch.setattr(decode_step, "SPAN", 8)
    model = small(name, **CASES[name]).cuda()
    options = GREEDY | {"max_new_tokens": 24, "eos_token_id": None}
    for prompt in ([5], list(range(1, 20))):
        assert ours(model, prompt, decode_graph.capture_for(model), **options) == theirs(model, prompt, **options)


@GPU
@pytest.mark.parametrize("name", MODELS)
def test_a_cuda_graph_of_ops_says_what_transformers_says(name, monkeypatch):
    monkeypatch.setattr(decode_step, "SPAN", 16)
    model, options = layered(name, **MODELS[name]).cuda(), {"max_new_tokens": 40, "do_sample": False}
    for ids in (prompt_of(13).cuda(), prompt_of(1).cuda()):
        expected = theirs(model, ids[0].tolist(), eos_token_id=None, pad_token_id=0, **options)
        assert by_ops(model, ids, OpStep(model), decode_graph.capture_for(model), **options) == expected


@GPU
def test_a_seed_means_the_same_text_on_a_gpu():
    model = small("llama").cuda()
    options = SAMPLED | {"max_new_tokens": 40, "eos_token_id": None}
    first, second = (ours(model, [1, 2, 3], decode_graph.capture_for(model), **options) for _ in range(2))
    assert first == second and len(set(first)) > 5


@GPU
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_models_on_a_gpu(bits):
    """Captured where kernels serve; else as transformers does it. The same tokens as without a capture."""
    model, tokenizer = qcli.load(str(DEMO), bits=bits, device="cuda", dtype="float32")
    prompt, sampling = tokenizer("One rainy day")["input_ids"], decode.Sampling(temperature=0, max_new_tokens=40)
    result = decode.generate(model, tokenizer, prompt, sampling, lambda token: None)
    assert result.token_ids == theirs(model, prompt, max_new_tokens=40, do_sample=False)
    assert (result.capture_seconds is not None) == (decode_graph.capture_for(model) is not None)
