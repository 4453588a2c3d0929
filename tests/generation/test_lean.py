"""The lean step against transformers' own step: tokens, refusals, the cache, the checks at the first prompt."""

import ctypes
import json
import shutil

import pytest
import torch
import transformers as t

import qcli
from qcli.errors import UsageError
from qcli.evaluation.int8_cache import round_cache
from qcli.generation import decode, drafts, lean, lean_step, memory_limit
from qcli.generation.sampling import Sampling
from qcli.generation.step import Unsupported
from qcli.memory.costs.cache import cache
from qcli.memory.model.config import ModelConfig
from qcli.nn.linear_8bit import Linear8bit
from qcli.ops.linear_w8a16 import PreparedW8A16
from qcli.runtime import cpu
from tests.conftest import ROOT

DEMO = ROOT / "examples" / "demo-model"
pytestmark = pytest.mark.skipif(not cpu.variants(), reason="there is no kernel")

BASE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WIDE = {"head_dim": 32}
WINDOW = {"sliding_window": 9}
NEOX = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": 199, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
MODELS = {
    "llama": BASE,
    "mistral": BASE | WINDOW,
    "ministral": BASE | WINDOW | WIDE,
    "qwen2": BASE,
    "qwen3": BASE | WIDE,
    "gemma": BASE | WIDE,
    "gemma2": BASE | WIDE | WINDOW | {"query_pre_attn_scalar": 20},
    "gemma3_text": BASE | WIDE | WINDOW | {"query_pre_attn_scalar": 20, "sliding_window_pattern": 2},
    "vaultgemma": BASE | WIDE | WINDOW | {"query_pre_attn_scalar": 20},
    "phi3": BASE,
    "phi": BASE,
    "smollm3": BASE | {"no_rope_layers": [1, 0, 1]},
    "granite": BASE | {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_multiplier": 0.1},
    "olmo": BASE,
    "olmo2": BASE,
    "olmo3": BASE | WINDOW,
    "stablelm": BASE | {"use_qkv_bias": True},
    "stablelm-parallel": BASE | {"use_parallel_residual": True},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": NEOX,
    "gpt_neox-sequential": NEOX | {"use_parallel_residual": False},
    "starcoder2": BASE | WINDOW,
    "cohere": BASE,
    "cohere2": BASE | WINDOW,
    "glm": BASE | WIDE,
    "glm4": BASE | WIDE,
    "helium": BASE | {"head_dim": 16},
    "ernie4_5": BASE,
    "exaone4": BASE | WINDOW,
    "arcee": BASE,
    "nemotron": BASE,
    "seed_oss": BASE | WIDE,
}
# What is not recognised: experts, other names, positions inside attention, norms after the rotation.
OTHERS = {
    "mixtral": BASE | {"num_local_experts": 2},
    "opt": {"vocab_size": 199, "hidden_size": 64, "ffn_dim": 112, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gptj": {"vocab_size": 199, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "hunyuan_v1_dense": BASE | WIDE,
}


def small(name: str, dtype=torch.float32, **sizes):
    """A model with random weights, random norms and biases among them."""
    torch.manual_seed(0)
    config = t.AutoConfig.for_model(name.split("-")[0], **sizes, bos_token_id=1, eos_token_id=None)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight += 0.3 * drawn
            else:
                embedded = 0.15 if "gemma" in name else 0.5  # Gemma scales its embeddings
                weight.copy_(drawn * weight.shape[-1] ** -0.5 * (embedded if "embed" in path or "wte" in path else 1.2))
    return model.to(dtype)


def prompt_of(tokens: int) -> torch.Tensor:
    return torch.randint(3, 199, (1, tokens), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def theirs(model, ids, **options) -> list[int]:
    made = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options)
    return made[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def ours(model, ids, stepped=None, **options) -> list[int]:
    made: list[int] = []
    stepped = stepped or lean.Lean(model)
    lean.generate(model, ids, stepped, made.append, eos_token_id=None, pad_token_id=0, **options)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_transformers(name):
    model = small(name, **MODELS[name])
    expected = theirs(model, prompt_of(13), max_new_tokens=40, do_sample=False)
    assert len(set(expected)) > 1 and ours(model, prompt_of(13), max_new_tokens=40, do_sample=False) == expected


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "cohere2"])
def test_prompts_of_any_length_with_one_step(name):
    """The step is made at the first prompt, by another text if that one is short, and used for the others."""
    model = small(name, **MODELS[name])
    stepped = lean.Lean(model)
    for tokens in (1, 3, 20, 7):
        options = {"max_new_tokens": 15, "do_sample": False}
        assert ours(model, prompt_of(tokens), stepped, **options) == theirs(model, prompt_of(tokens), **options)


def test_sampled_tokens_are_those_of_transformers():
    model = small("llama", **BASE)
    rules = {"max_new_tokens": 30, "do_sample": True, "top_k": 20, "temperature": 0.8, "repetition_penalty": 1.2}
    torch.manual_seed(3)
    expected = theirs(model, prompt_of(9), **rules)
    torch.manual_seed(3)
    assert ours(model, prompt_of(9), **rules) == expected


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "llama"])
def test_a_cache_grows_with_the_text(name, monkeypatch):
    monkeypatch.setattr(lean, "ROOM", 4)
    model = small(name, **MODELS[name])
    stepped = lean.Lean(model)
    options = {"max_new_tokens": 60, "do_sample": False}
    assert ours(model, prompt_of(9), stepped, **options) == theirs(model, prompt_of(9), **options)
    assert stepped.step.caches.length == 9 + 60  # doubled from 13, and no more than the longest text
    windows = stepped.step.caches.windows
    assert any(windows) == (name != "llama")
    for layer, window in zip(stepped.step.caches.layers, windows):
        assert layer.keys.shape[1] == (window + lean_step.MOST_TOKENS - 1 if window else 69)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_several_tokens_at_once_give_the_logits_of_one_after_the_other(name):
    model = small(name, **MODELS[name])
    stepped, ids = lean.Lean(model), prompt_of(30)[0]
    with torch.inference_mode():
        stepped.prefill(ids[None, :10], {}, 40)
        one = torch.cat([stepped.run(ids[i : i + 1], i).clone() for i in range(10, 30)])
        stepped.prefill(ids[None, :10], {}, 40)
        several = torch.cat([stepped.run(ids[i : i + 5], i).clone() for i in range(10, 30, 5)])
        whole = model(ids[None]).logits[0, 10:]
    torch.testing.assert_close(several, one, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_no_farther_from_float32_than_transformers(name, dtype):
    exact, model, ids = small(name, **MODELS[name]), small(name, dtype, **MODELS[name]), prompt_of(30)
    with torch.inference_mode():
        for weight, rounded in zip(exact.parameters(), model.parameters()):
            weight.copy_(rounded)
        expected, rounded = exact(ids).logits[0, 12:], model(ids).logits[0, 12:].float()
        stepped = lean.Lean(model)
        stepped.prefill(ids[:, :12], {}, 40)
        logits = torch.cat([stepped.run(ids[0, i : i + 1], i).clone() for i in range(12, 30)])
    assert (logits - expected).norm() <= 1.1 * (rounded - expected).norm()
    assert (logits - expected).norm() > 0


@pytest.mark.parametrize("bits", [4, 8, None])
def test_the_demo_model(bits):
    """In float32 the 4-bit product is exact in both; rounding of activations to int8 is left to transformers' step."""
    model, tokenizer = qcli.load(str(DEMO), bits=bits, device="cpu", dtype="float32")
    if bits == 8:
        for module in model.modules():
            if isinstance(module, Linear8bit):
                module.activations_in_int8 = False
    ids = torch.tensor([tokenizer("One rainy day")["input_ids"]])
    options = {"max_new_tokens": 40, "do_sample": False}
    assert ours(model, ids, **options) == theirs(model, ids, **options)


def test_new_tokens_of_llm_int8_keep_their_activations():
    model, _ = qcli.load(str(DEMO), bits=8, device="cpu", int8_activations=None)
    modules = [module for module in model.modules() if isinstance(module, Linear8bit)]
    assert len(modules) == 42 and all(module.activations_in_int8 and not module.few_in_int8 for module in modules)
    assert isinstance(modules[0].for_few_tokens(), PreparedW8A16)
    x = torch.randn(40, modules[0].in_features)
    with torch.inference_mode():
        few, many = modules[0](x[:4]), modules[0](x)[:4]
        modules[0].activations_in_int8 = False
        whole = modules[0](x)[:4]
    torch.testing.assert_close(few, whole, rtol=1e-5, atol=1e-5)
    assert (many - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_keep_the_step_of_transformers(name):
    model = small(name, **OTHERS[name])
    with pytest.raises(Unsupported):
        ours(model, prompt_of(9), max_new_tokens=2, do_sample=False)


def _scaled(model):
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: 1.02 * forward(x)


def _shifted(model):
    layer = model.model.layers[2]
    forward = layer.forward
    layer.forward = lambda x, **options: forward(x, **options) + 0.01


def _head(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda x: forward(x).tanh()


def _embedded(model):
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output + 0.1 * output.abs())


def _hooked(model):
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: 1.1 * output)


@pytest.mark.parametrize("change", [_scaled, _shifted, _head, _hooked])
def test_a_model_that_computes_something_else_is_found_out(change):
    model = small("llama", **BASE)
    change(model)
    with pytest.raises(Unsupported):
        ours(model, prompt_of(9), max_new_tokens=2, do_sample=False)


def test_an_embedding_with_a_hook_is_called_as_a_module():
    model = small("llama", **BASE)
    _embedded(model)
    options = {"max_new_tokens": 12, "do_sample": False}
    assert ours(model, prompt_of(9), **options) == theirs(model, prompt_of(9), **options)


def decoded(model, tokenizer):
    return decode.Decoding(model, tokenizer, Sampling(max_new_tokens=5, temperature=0))


def test_what_runs_the_steps(monkeypatch):
    model, tokenizer = qcli.load(str(DEMO), device="cpu")
    result = decoded(model, tokenizer).generate([5, 6, 7], lambda token: None)
    config = model.config
    row = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 2  # keys and values of two bytes
    assert result.step == "lean" and result.cache_bytes == row * (3 + 5 / 2)
    monkeypatch.setenv(lean.CHOICE, "transformers")
    other = decoded(model, tokenizer).generate([5, 6, 7], lambda token: None)
    assert other.step == "transformers" and other.cache_bytes is None and other.token_ids == result.token_ids
    monkeypatch.setenv(lean.CHOICE, "fast")
    with pytest.raises(UsageError, match="QCLI_STEP is 'fast'"):
        decoded(model, tokenizer)
    monkeypatch.delenv(lean.CHOICE)
    with cpu.using(None):
        assert decoded(model, tokenizer).generate([5, 6, 7], lambda token: None).step == "transformers"
    model.model.layers[0].mlp.forward = lambda x: x
    assert decoded(model, tokenizer).generate([5, 6, 7], lambda token: None).step == "transformers"


def test_threads_give_the_same_logits(monkeypatch):
    """A team of three; threads of the library's own, where torch has no OpenMP; and one thread."""
    model, _ = qcli.load(str(DEMO), bits=4, device="cpu")
    stepped, ids = lean.Lean(model), prompt_of(12)
    with torch.inference_mode():
        stepped.prefill(ids, {}, 40)
        before = stepped.step.caches.layers[0].keys[:, :12].clone()

        def run():
            stepped.step.caches.layers[0].keys[:, :12] = before
            return stepped.run(torch.tensor([7, 8, 9]), 12).clone()

        one = run()
        for threads in (1, 3, 5):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            for _ in range(5):
                assert torch.equal(run(), one)
        cpu.library().qcli_use_openmp(None)
        try:
            assert torch.equal(run(), one)
        finally:
            cpu.library().qcli_use_openmp(ctypes.c_void_p(cpu._torch_openmp()))


def test_what_a_step_reads():
    tied, untied = small("llama", **BASE | {"tie_word_embeddings": True}), small("llama", **BASE)
    count = sum(weight.numel() for weight in untied.parameters())
    buffers = sum(buffer.numel() for buffer in untied.buffers())
    assert memory_limit.bytes_a_step(untied) == 4 * (count + buffers - 199 * 64)
    assert memory_limit.bytes_a_step(tied) == 4 * (count + buffers - 199 * 64)  # one table, read by the head
    assert memory_limit.bytes_a_step(small("mixtral", **OTHERS["mixtral"])) is None


def test_the_speed_of_memory_is_measured_on_the_weights():
    speed = cpu.read_speed([torch.zeros(1 << 20), torch.zeros(10)], seconds=0.01)
    assert speed is not None and 1e8 < speed < 1e13
    assert cpu.read_speed([torch.zeros(10)]) is None


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
            model, prompt_of(9), lean.Lean(model), made.append, oracle, eos_token_id=None, pad_token_id=0, **options
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
            steps = lean.generate(model, prompt_of(tokens), lean.Lean(model), made.append, draft, **options)
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "phi3"])
def test_an_int8_cache_is_what_evaluate_rounds(name, monkeypatch):
    """Token by token, so that every key and value is read rounded; past the window and past caches that are full."""
    monkeypatch.setattr(lean, "ROOM", 4)
    model, ids = small(name, **MODELS[name]), prompt_of(40)
    stepped = lean.Lean(model, kv_int8=True)
    with torch.inference_mode():
        stepped.prefill(ids[:, :1], {}, 40)
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
    caches = lean.Lean(model, kv_int8=kv_dtype == "int8")._caches(32_768, torch.int8 if kv_dtype else torch.bfloat16)
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
