"""The captured step, with stand-ins for a CUDA graph that run on a CPU: one calls the step, one replays what it recorded."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import qcli
from qcli import decode, decode_graph, decode_step
from tests.conftest import ROOT
from tests.models import ARCHITECTURES

DEMO = ROOT / "examples" / "demo-model"
aten = torch.ops.aten
WAITS = {aten.item, aten.is_nonzero, aten._local_scalar_dense, aten.nonzero, aten.masked_select}  # for the host


def call_it(rehearse, step):
    rehearse()
    return step


class Tape(TorchDispatchMode):
    """Records the ops of a step with the numbers in them, as a graph does, and does them again."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        # lift_fresh makes a tensor of a number of Python's; of a bool it is `mask[...] = 0`, a mere fill on CUDA.
        if op.overloadpacket in WAITS or (op is aten.lift_fresh.default and args[0].dtype != torch.bool):
            raise RuntimeError(f"{op} would wait for the host")
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result

    def replay(self):
        made = {}  # what stands now for each result of the recording

        def now(tensor):
            return made.get(id(tensor), tensor)

        for op, args, kwargs, recorded in self.calls:
            args, kwargs = tree_map_only(torch.Tensor, now, (args, kwargs))
            result = op(*args, **kwargs)
            before = recorded if isinstance(recorded, (tuple, list)) else [recorded]
            after = result if isinstance(result, (tuple, list)) else [result]
            made.update({id(b): a for b, a in zip(before, after) if isinstance(b, torch.Tensor)})


def record_it(rehearse, step):
    rehearse()
    with Tape() as tape:
        step()
    return tape.replay


def small(name, **changes):
    """A model in float32, where no two sums of another order give another token."""
    torch.manual_seed(0)
    model_class, config, _ = ARCHITECTURES[name]
    config = config()
    config.update(changes)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        for module in model.base_model.modules():
            if isinstance(module, (torch.nn.Linear, t.pytorch_utils.Conv1D)):
                module.weight *= 6  # as they come, attention hardly moves what is said
    return model


def theirs(model, prompt, **options):
    ids = torch.tensor([prompt], device=model.device)
    torch.manual_seed(7)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def ours(model, prompt, capture, **options):
    heard = []

    def hear(token):
        heard.append(token)
        ends = options.get("eos_token_id") or []
        return token in ends

    torch.manual_seed(7)
    with torch.inference_mode():
        ids = torch.tensor([prompt], device=model.device)
        decode_graph.generate(model, ids, capture, hear, lambda: None, **options)
    return heard


GREEDY = {"do_sample": False, "repetition_penalty": 1.3}  # without the penalty random models say one word
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 60, "top_p": 0.95, "min_p": 0.001}
WINDOW = {"sliding_window": 8}
CASES = {
    "llama": {}, "gpt2": {}, "qwen2": {}, "qwen3": {}, "mistral": WINDOW, "gemma2": WINDOW, "gemma3_text": WINDOW, "phi3": {},
    "gpt_neox": {}, "stablelm": {}, "olmo2": {}, "cohere": {}, "starcoder2": WINDOW,
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_replayed_step_says_what_transformers_says(name, monkeypatch):
    """Greedy and sampled, from one id and from several, past the window and past three lengths of attention."""
    monkeypatch.setattr(decode_step, "SPAN", 8)
    model = small(name, **CASES[name])
    assert decode_graph.supported(model)
    for prompt, rules in (([5], GREEDY), ([1, 2, 3, 4, 5, 6, 7], SAMPLED), (list(range(1, 20)), GREEDY)):
        options = rules | {"max_new_tokens": 24, "eos_token_id": None}
        expected = theirs(model, prompt, **options)
        assert len(set(expected)) > 5
        assert ours(model, prompt, record_it, **options) == expected


def test_hybrid_layers_with_a_window_of_their_own():
    model = small("gemma3_text", layer_types=["sliding_attention", "full_attention"], **WINDOW)
    options = GREEDY | {"max_new_tokens": 30, "eos_token_id": None}
    assert ours(model, [3, 1, 4], record_it, **options) == theirs(model, [3, 1, 4], **options)


def test_attention_that_is_looks_at_spans_only(monkeypatch):
    """A capture for each doubling, none for more places than the text can fill."""
    monkeypatch.setattr(decode_step, "SPAN", 8)
    spans = []

    def capture(rehearse, step):
        spans.append(places(step).span)
        return call_it(rehearse, step)

    def places(step):
        return step.__self__.places

    model = small("llama")
    ours(model, [1] * 5, capture, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert spans == [8]
    spans.clear()
    ours(model, [1] * 5, capture, max_new_tokens=35, do_sample=False, eos_token_id=None)
    assert spans == [8, 16, 32, 40]
    spans.clear()
    ours(model, [1] * 20, capture, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert spans == [32]


@pytest.mark.parametrize("bits", [4, 8, None])
def test_quantized_models(bits):
    model, tokenizer = qcli.load(str(DEMO), bits=bits, device="cpu", dtype="float32")
    prompt = tokenizer("One rainy day")["input_ids"]
    for rules in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}):
        options = rules | {"max_new_tokens": 40}
        assert ours(model, prompt, call_it, **options)[:40] == theirs(model, prompt, **options)


def test_tokens_are_looked_at_one_step_late():
    """The end is noticed after one more step; the id of that step is dropped."""
    model = small("llama")
    options = GREEDY | {"max_new_tokens": 20, "eos_token_id": None}
    free = ours(model, [1, 2, 3], call_it, **options)
    stop = free[6]
    first = free.index(stop)
    events = []

    def capture(rehearse, step):
        rehearse()

        def launch():
            events.append("launch")
            step()

        return launch

    def hear(token):
        events.append(token)
        return token == stop

    with torch.inference_mode():
        decode_graph.generate(model, torch.tensor([[1, 2, 3]]), capture, hear, lambda: None, **options)
    assert [e for e in events if e != "launch"] == free[: first + 1]
    assert (
        events.count("launch") == first + 1
    )  # the prefill made the first id, a launch each of the others and the surplus
    for i, token in enumerate(free[: first + 1]):
        assert events[2 * i : 2 * i + 2] == ["launch", token]


def test_the_limit_launches_no_step_too_many():
    model, launched = small("llama"), []

    def capture(rehearse, step):
        return lambda: (launched.append(1), step())

    heard = ours(model, [1, 2], capture, do_sample=False, max_new_tokens=6, eos_token_id=None)
    assert len(heard) == 6 and len(launched) == 5


def test_the_command_and_the_library_take_this_way_where_they_can(monkeypatch):
    model, tokenizer = qcli.load(str(DEMO), bits=4, device="cpu")
    prompt, sampling = tokenizer("Once")["input_ids"], decode.Sampling(temperature=0.7, seed=3, max_new_tokens=30)
    plain = decode.generate(model, tokenizer, prompt, sampling, lambda token: None)
    assert plain.capture_seconds is None
    monkeypatch.setattr(decode_graph, "capture_for", lambda model: call_it)
    heard = []
    captured = decode.generate(model, tokenizer, prompt, sampling, heard.append)
    assert captured.token_ids == heard == plain.token_ids and captured.capture_seconds > 0
    assert captured.prefill_seconds > 0 and captured.decode_seconds > 0 and captured.finished == plain.finished


@pytest.mark.parametrize("rules", [{"no_repeat_ngram_size": 2}, {"min_new_tokens": 3}, {"num_beams": 2}])
def test_rules_that_look_at_the_text_are_left_to_transformers(rules):
    model = small("llama")
    with pytest.raises(decode_graph.Unsupported):
        ours(model, [1, 2], call_it, max_new_tokens=4, **rules)
    model.generation_config.update(**rules)
    expected = theirs(model, [1, 2], max_new_tokens=4)
    assert len(expected) == 4


def test_models_that_cannot_be_captured_are_known_beforehand():
    for name in ("bloom", "t5"):
        assert not decode_graph.supported(small(name))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for changes in (
        {"rope_parameters": rope},
        {"attention_chunk_size": 8},
        {"_attn_implementation": "flash_attention_2"},
    ):
        model = small("llama")
        for key, value in changes.items():
            setattr(model.config, key, value)
        assert not decode_graph.supported(model)
    mamba = t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4))
    assert not decode_graph.supported(mamba)
    assert decode_graph.capture_for(small("llama")) is None  # no GPU


def test_a_capture_that_fails_leaves_it_to_transformers(monkeypatch):
    """Nothing was heard, and the seed has not moved."""
    model, tokenizer = qcli.load(str(DEMO), device="cpu")
    prompt, sampling = tokenizer("Once")["input_ids"], decode.Sampling(temperature=1.0, seed=3, max_new_tokens=20)
    plain = decode.generate(model, tokenizer, prompt, sampling, lambda token: None)

    def capture(rehearse, step):
        rehearse()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode_graph, "capture_for", lambda model: capture)
    heard = []
    result = decode.generate(model, tokenizer, prompt, sampling, heard.append)
    assert result.token_ids == heard == plain.token_ids and result.capture_seconds is None


def test_a_step_that_waits_for_the_host_is_not_captured():
    """OPT makes a mask as long as the text, which it need not; and a hook that asks for a number."""
    hooked = small("llama")
    hooked.lm_head.register_forward_hook(lambda module, args, output: output * float(output.abs().max() > 0))
    for model in (small("opt"), hooked):
        with pytest.raises(decode_graph.Unsupported):
            ours(model, [1, 2], record_it, max_new_tokens=4, do_sample=False)


def test_models_stay_as_they_were():
    model = small("gemma2")
    before = copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    ours(model, [1, 2], call_it, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model.config.to_dict() == before[0]
    assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())


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
        "+device", "side waits", "+stream", "rehearse", "rehearse", "-stream", "main waits", "+graph", "step", "-graph",
        "-device", "replay",
    ]  # fmt: skip


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
