"""The captured step by ops, with stand-ins for a CUDA graph: tokens, logits, launches, and what is left to transformers."""

import pytest
import torch

import qcli
from qcli.generation import decode, op_step
from qcli.generation import graph as decode_graph
from qcli.generation import step as decode_step
from qcli.generation.op_step import OpStep
from qcli.generation.step import Decoder, Unsupported
from tests.captures import Tape, call_it, record_it
from tests.conftest import ROOT
from tests.lean_models import BASE, MODELS, OTHERS, prompt_of, small, theirs

DEMO = ROOT / "examples" / "demo-model"


def ours(model, ids, ops, capture=record_it, **options) -> list[int]:
    heard: list[int] = []
    with torch.inference_mode():
        decode_graph.generate(model, ids, capture, lambda token: heard.append(token) or False, lambda: None, ops, **options)
    return heard


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(name, monkeypatch):
    """Past the window, and past two lengths of the cache."""
    monkeypatch.setattr(decode_step, "SPAN", 16)
    model = small(name, **MODELS[name])
    for count in (13, 1):
        expected = theirs(model, prompt_of(count), max_new_tokens=40, do_sample=False)
        assert (
            len(set(expected)) > 1 and ours(model, prompt_of(count), OpStep(model), max_new_tokens=40, do_sample=False) == expected
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2", "gpt_neox", "qwen3"])
def test_16_bits_are_no_farther_from_float32_than_transformers(name, dtype):
    exact, model, ids = small(name, **MODELS[name]), small(name, dtype, **MODELS[name]), prompt_of(30)
    ops = OpStep(model)
    with torch.inference_mode():
        for weight, rounded in zip(exact.parameters(), model.parameters()):
            weight.copy_(rounded)
        expected, rounded = exact(ids).logits[0, 12:], model(ids).logits[0, 12:].float()
        decoder = Decoder(model, 12, 40, lambda history, scores: scores, False, call_it, ops)
        decoder.prefill(ids[:, :12], {})
        found = []
        for i in range(12, 30):
            decoder.places.position.fill_(i)
            found.append(ops.logits(ids[0, i : i + 1], decoder.places.position, decoder.cache.layers, decoder.tables))
    logits = torch.cat(found)
    assert 0 < (logits - expected).norm() <= 1.1 * (rounded - expected).norm()


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 4, "head": 8}, {"bits": 8}, {"bits": 8, "head": 4}, {}])
def test_the_demo_model(options):
    rounds = False if options.get("bits") == 8 else True
    model, tokenizer = qcli.load(str(DEMO), device="cpu", dtype="float32", int8_activations=rounds, **options)
    ids = torch.tensor([tokenizer("One rainy day")["input_ids"]])
    rules = {"max_new_tokens": 40, "do_sample": False}
    assert ours(model, ids, OpStep(model), call_it, **rules)[:40] == theirs(model, ids, **rules)[:40]


def test_a_step_is_less_than_half_as_many_launches():
    model = small("llama", torch.bfloat16, **BASE)
    counts = []
    for ops in (OpStep(model), None):

        def capture(rehearse, step):
            rehearse()
            with Tape() as tape:
                step()
            counts.append(sum("view" not in str(op) and "select" not in str(op) for op, *_ in tape.calls))
            return step

        ours(model, prompt_of(5), ops, capture, max_new_tokens=2, do_sample=False)
    assert counts[0] < counts[1] / 2


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_left_to_transformers(name):
    model = small(name, **OTHERS[name])
    assert op_step.op_step(model) is None


def test_a_model_that_computes_something_else_is_left_to_transformers(monkeypatch):
    model = small("llama", **BASE)
    attention = model.model.layers[1].self_attn
    plain = attention.forward
    attention.forward = lambda *arguments, **options: (plain(*arguments, **options)[0] * 1.5, None)
    with pytest.raises(Unsupported):
        OpStep(model)
    monkeypatch.setenv("QCLI_STEP", "transformers")
    assert op_step.op_step(small("llama", **BASE)) is None


def test_ops_that_cannot_be_captured_are_left_to_transformers():
    model = small("llama", **BASE)
    ops, tried = OpStep(model), []

    def failing(*arguments):
        tried.append(1)
        raise RuntimeError("no image for this GPU")

    ops.logits = failing
    expected = theirs(model, prompt_of(5), max_new_tokens=10, do_sample=False)
    assert ours(model, prompt_of(5), ops, max_new_tokens=10, do_sample=False) == expected and tried == [1]


def test_ops_that_fail_are_not_tried_again(monkeypatch):
    model, tokenizer = qcli.load(str(DEMO), bits=4, device="cpu", dtype="float32")
    prompt, sampling = tokenizer("Once")["input_ids"], decode.Sampling(max_new_tokens=5)
    monkeypatch.setattr(decode_graph, "capture_for", lambda model: call_it)
    tried = []
    monkeypatch.setattr(OpStep, "logits", lambda *arguments: tried.append(1) or torch.zeros(1, 1) @ torch.zeros(2, 2))
    decoding = decode.Decoding(model, tokenizer, sampling)
    texts = [decoding.generate(prompt, lambda token: None).token_ids for _ in range(2)]
    assert tried == [1] and decoding.ops is False and texts[0] == texts[1]


def test_generate_captures_ops(monkeypatch):
    model, tokenizer = qcli.load(str(DEMO), bits=4, device="cpu", dtype="float32")
    prompt, sampling = tokenizer("Once")["input_ids"], decode.Sampling(max_new_tokens=30)
    plain = decode.generate(model, tokenizer, prompt, sampling, lambda token: None)
    monkeypatch.setattr(decode_graph, "capture_for", lambda model: call_it)
    decoding = decode.Decoding(model, tokenizer, sampling)
    for _ in range(2):
        captured = decoding.generate(prompt, lambda token: None)
        assert captured.token_ids == plain.token_ids and captured.step == "captured"
        ops = decoding.ops
        assert isinstance(ops, OpStep)
    assert decoding.ops is ops
