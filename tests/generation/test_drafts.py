"""Guesses of tokens do not change a text."""

import json
import shutil

import pytest
import torch

import qcli
from qcli.errors import QcliWarning
from qcli.generation import decode, drafts, lean
from qcli.generation.sampling import Sampling
from qcli.runtime import cpu
from tests.conftest import ROOT
from tests.lean_models import BASE, MODELS, prompt_of, small, theirs

DEMO = ROOT / "examples" / "demo-model"
pytestmark = pytest.mark.skipif(not cpu.variants(), reason="there is no kernel")


class _Oracle(drafts.PromptLookup):
    """Guesses that are right, wrong, or right at first, in turn."""

    def __init__(self, text: list[int]):
        self.text, self.turn = text, 0
        self.heard: list[tuple[int, int]] = []

    def guess(self, ids, most):
        self.turn += 1
        right = self.text[len(ids) : len(ids) + most]
        return [right, [(token + 1) % 199 for token in right], right[:2] + [0] * (len(right) - 2), []][self.turn % 4]

    def hear(self, guessed, kept):
        self.heard.append((guessed, kept))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("rules", [{"do_sample": False}, {"do_sample": True, "top_k": 20, "repetition_penalty": 1.2}])
def test_guesses_do_not_change_the_text(name, rules, monkeypatch):
    """Right and wrong ones, past the window and past a cache that is full."""
    monkeypatch.setattr(lean, "ROOM", 4)
    model = small(name, **MODELS[name])
    options = rules | {"max_new_tokens": 60}
    torch.manual_seed(3)
    expected = theirs(model, prompt_of(9), **options)
    oracle, made = _Oracle(prompt_of(9)[0].tolist() + expected), []
    torch.manual_seed(3)
    with torch.inference_mode():
        steps = lean.generate(
            model, prompt_of(9), lean.Lean(model), made.append, lambda: None, oracle, eos_token_id=None, pad_token_id=0, **options
        )
    assert made == expected and steps < 40
    assert {(7, 7), (7, 0), (7, 2), (0, 0)} <= set(oracle.heard)


def test_a_prompt_is_looked_up():
    lookup = drafts.PromptLookup()
    lookup.begin([1, 2, 3], 100)
    assert lookup.guess([1, 2, 3, 4, 5, 6, 7, 1, 2], 7) == [3, 4, 5, 6]  # two tokens are known, four are guessed at first
    lookup.hear(4, 4)
    assert lookup.guess([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 7) == [4, 5, 6, 7, 1, 2]
    assert lookup.guess([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 3) == [4, 5, 6]
    lookup.hear(6, 0)
    assert lookup.guess([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4], 7) == [5, 6]
    assert lookup.guess([1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 9], 7) == []
    lookup.begin([5], 100)
    assert lookup.guess([5], 7) == [] and lookup.guess([5, 6, 5, 6], 7) == [5, 6]


@pytest.mark.parametrize("tokens", [1, 12])
def test_a_draft_model_follows_the_text(tokens):
    """A draft that is the model itself is right each time; another one is not, and the text stays the same."""
    model, other = small("llama", **BASE), small("qwen2", **BASE)
    options = {"max_new_tokens": 50, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.inference_mode():
        expected = theirs(model, prompt_of(tokens), max_new_tokens=50, do_sample=False)
        for guesser, fewest, most in ((model, 7, 9), (other, 25, 49)):
            made: list[int] = []
            draft = drafts.DraftModel(lean.Lean(guesser))
            steps = lean.generate(model, prompt_of(tokens), lean.Lean(model), made.append, lambda: None, draft, **options)
            assert made == expected and fewest <= steps <= most


def test_the_draft_of_a_command(quick_cli, tmp_path):
    prompt = "One rainy day Finn found a tiny shell. One rainy day Finn found a"
    plain = json.loads(quick_cli("generate", DEMO, prompt, "--json").stdout)
    for draft in ("prompt", DEMO):
        guessed = json.loads(quick_cli("generate", DEMO, prompt, "--json", "--draft", draft).stdout)
        assert guessed["text"] == plain["text"] and guessed["tokens_per_step"] > 1 == plain["tokens_per_step"]
    assert f"{guessed['tokens_per_step']:.1f} a step" in quick_cli("generate", DEMO, prompt, "--draft", DEMO).stderr
    with_other_words = tmp_path / "other"
    shutil.copytree(DEMO, with_other_words)
    words = json.loads((with_other_words / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (with_other_words / "tokenizer.json").write_text(json.dumps(words))
    refused = quick_cli("generate", DEMO, prompt, "--draft", with_other_words)
    assert refused.returncode == 2 and "the draft's vocabulary differs from the model's in 4 entries" in refused.stderr


def test_a_draft_with_fewer_positions_stops_guessing():
    sizes = MODELS["gpt2"]
    model, little = small("gpt2", **sizes), small("gpt2", **sizes | {"n_positions": 32})
    options = {"max_new_tokens": 40, "do_sample": False}
    for tokens in (9, 31, 40):
        expected, made = theirs(model, prompt_of(tokens), **options), []
        draft = drafts.DraftModel(lean.Lean(little), 32)
        with torch.inference_mode():
            lean.generate(
                model,
                prompt_of(tokens),
                lean.Lean(model),
                made.append,
                lambda: None,
                draft,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        assert made == expected


def test_a_draft_that_cannot_be_used_is_named():
    """One whose own step is refused at the first prompt, one beside transformers' step, one beside int8 activations."""
    model, tokenizer = qcli.load(str(DEMO), device="cpu")
    other, _ = qcli.load(str(DEMO), device="cpu")
    draft = drafts.DraftModel(lean.Lean(other))
    other.model.layers[0].mlp.forward = lambda x: x
    plain = decode.Decoding(model, tokenizer, Sampling(max_new_tokens=9)).generate([5, 6, 7], lambda token: None)
    with pytest.warns(QcliWarning, match="--draft is not used: the draft differs"):
        decoding = decode.Decoding(model, tokenizer, Sampling(max_new_tokens=9), draft=draft)
        result = decoding.generate([5, 6, 7], lambda token: None)
    assert result.step == "lean" and result.tokens_per_step == 1 and result.token_ids == plain.token_ids
    rounding, _ = qcli.load(str(DEMO), bits=8, device="cpu")
    for refused, reason in ((rounding, "outlier columns"), (other, "LlamaForCausalLM does not run with the lean step")):
        with pytest.warns(QcliWarning, match=reason):
            decoding = decode.Decoding(refused, tokenizer, Sampling(max_new_tokens=9), draft=drafts.PromptLookup())
            assert decoding.generate([5, 6, 7], lambda token: None).tokens_per_step == 1
