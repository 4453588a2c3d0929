"""The captured step, with stand-ins for a CUDA graph: one calls the step, one replays the ops that it recorded."""

import copy

import pytest
import torch
import transformers as t

import qcli
from qcli.generation import decode
from qcli.generation import graph as decode_graph
from qcli.generation import step as decode_step
from tests.captures import CASES, GREEDY, SAMPLED, WINDOW, call_it, ours, record_it, small, theirs
from tests.conftest import ROOT

DEMO = ROOT / "examples" / "demo-model"


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


def test_a_cache_doubles_when_it_is_full(monkeypatch):
    """A capture for each size, none for more places than the text can fill; attention reads no more than there are."""
    monkeypatch.setattr(decode_step, "SPAN", 8)
    spans = []

    def capture(rehearse, step):
        rehearse()
        decoder = step.__self__
        spans.append(decoder.places.span)
        assert all(layer.keys.shape[2] == layer.values.shape[2] == spans[-1] for layer in decoder.cache.layers)
        return step

    for prompt, new, expected in ((5, 2, [8]), (5, 35, [8, 16, 32, 40]), (20, 10, [32]), (7, 1, [8]), (8, 8, [16])):
        spans.clear()
        ours(small("llama"), [1] * prompt, capture, max_new_tokens=new, do_sample=False, eos_token_id=None)
        assert spans == expected


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
    assert events.count("launch") == first + 1  # the prefill made the first id, a launch each of the others and the surplus
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
    for changes in ({"rope_parameters": rope}, {"attention_chunk_size": 8}, {"_attn_implementation": "flash_attention_2"}):
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
