"""The cache of the lean step in int8."""

import json

import pytest
import torch

import qcli
from qcli.errors import UsageError
from qcli.evaluation.int8_cache import round_cache
from qcli.generation import decode, lean, lean_step
from qcli.generation.sampling import Sampling
from qcli.memory.costs.cache import cache
from qcli.memory.model.config import ModelConfig
from qcli.runtime import cpu
from tests.conftest import ROOT
from tests.lean_models import MODELS, prompt_of, small

DEMO = ROOT / "examples" / "demo-model"
pytestmark = pytest.mark.skipif(not cpu.variants(), reason="there is no kernel")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "phi3"])
def test_an_int8_cache_is_what_evaluate_rounds(name, monkeypatch):
    """Token by token, so that every key and value is read rounded; past the window and past caches that are full."""
    monkeypatch.setattr(lean, "ROOM", 4)
    model, ids = small(name, **MODELS[name]), prompt_of(40)
    stepped = lean.Lean(model, kv_int8=True)
    with torch.inference_mode():
        stepped.prefill(ids[:, :1], 40)
        logits = torch.cat([stepped.run(ids[0, i : i + 1], i).clone() for i in range(40)])
        exact = model(ids).logits[0]
        round_cache(model)
        expected = model(ids).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert (expected - exact).norm() > 2e-3 * exact.norm()


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_long_cache_takes_the_memory_that_is_estimated(name, kv_dtype):
    model = small(name, torch.bfloat16, **MODELS[name])
    caches = lean.Lean(model, kv_int8=kv_dtype == "int8").caches(32_768, torch.int8 if kv_dtype else torch.bfloat16)
    estimated = cache(ModelConfig(model.config.to_dict(), "small"), 32_768, kv_dtype=kv_dtype)
    windows = sum(window > 0 for window in caches.windows)
    row = sum(x[:, 0].nbytes for x in caches.layers[0].tensors)
    beside = windows * row * (lean_step.MOST_TOKENS - 1)  # room for guesses beside a window
    assert sum(x.nbytes for layer in caches.layers for x in layer.tensors) == estimated.total + beside


def test_an_int8_cache_of_a_command(quick_cli):
    small_cache, model_cache = (
        json.loads(quick_cli("generate", DEMO, "One rainy day", "--json", "--max-new-tokens", "20", *options).stdout)
        for options in (("--kv-dtype", "8"), ("--kv-dtype", "16"))
    )
    assert small_cache["step"] == "lean" and small_cache["bytes_per_step"] < model_cache["bytes_per_step"]
    refused = quick_cli("generate", DEMO, "One", "--kv-dtype", "4")
    assert refused.returncode == 2 and "--kv-dtype is '4'" in refused.stderr


def test_an_int8_cache_needs_the_lean_step(monkeypatch):
    model, tokenizer = qcli.load(str(DEMO), device="cpu")
    monkeypatch.setenv(lean.CHOICE, "transformers")
    with pytest.raises(UsageError, match="--kv-dtype 8: LlamaForCausalLM runs with transformers' step here"):
        decode.Decoding(model, tokenizer, Sampling(), kv_dtype="int8")
    monkeypatch.delenv(lean.CHOICE)
    decoding = decode.Decoding(model, tokenizer, Sampling(max_new_tokens=3), kv_dtype="int8")
    model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(UsageError, match="--kv-dtype 8"):
        decoding.generate([5, 6, 7], lambda token: None)
