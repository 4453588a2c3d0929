"""The lean step against transformers' own step: tokens, refusals, the cache, the checks at the first prompt."""

import ctypes

import pytest
import torch

import qcli
from qcli.errors import UsageError
from qcli.generation import decode, lean, lean_step, memory_limit
from qcli.generation.sampling import Sampling
from qcli.generation.step import Unsupported
from qcli.nn.linear_8bit import Linear8bit
from qcli.ops.linear_w8a16 import PreparedW8A16
from qcli.runtime import cpu
from tests.conftest import ROOT
from tests.lean_models import BASE, MODELS, OTHERS, ours, prompt_of, small, theirs

DEMO = ROOT / "examples" / "demo-model"
pytestmark = pytest.mark.skipif(not cpu.variants(), reason="there is no kernel")


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


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "mistral", "gpt2"])
def test_a_conversation_reads_what_is_new(name, monkeypatch):
    """Turn by turn, as a chat; then a text that parts from the last one near its end, near its beginning, and at once."""
    monkeypatch.setattr(lean, "ROOM", 4)
    model = small(name, **MODELS[name])
    stepped, options = lean.Lean(model), {"max_new_tokens": 12, "do_sample": False}
    ids, read = prompt_of(20), []
    stepped_read = stepped._read
    monkeypatch.setattr(stepped, "_read", lambda ids, caches: read.append(ids.shape[1]) or stepped_read(ids, caches))
    for turn in range(3):
        answer = ours(model, ids, stepped, **options)
        assert answer == theirs(model, ids, **options)
        before = ids.shape[1] + len(answer)
        assert stepped.text == [*ids[0].tolist(), *answer][:-1]
        ids = torch.cat((ids, torch.tensor([answer]), prompt_of(7 + turn)), 1)
    assert read == [20]
    ours(model, ids, stepped, **options)
    assert stepped.kept == before - 1 and read == [20]
    for place, others in ((-2, 5), (-40, 20), (3, 30), (0, 9)):
        ids = torch.cat((ids[:, :place], torch.flip(prompt_of(others), [1])), 1)
        assert ours(model, ids, stepped, **options) == theirs(model, ids, **options)
        again = ours(model, ids, stepped, **options)  # the same prompt: its last token is read
        assert again == theirs(model, ids, **options) and stepped.kept in (0, ids.shape[1] - 1)
    if not any(stepped.windows):
        assert stepped.kept == ids.shape[1] - 1


def test_guesses_that_were_not_kept_are_not_taken_for_the_text():
    model = small("mistral", **MODELS["mistral"])
    stepped, ids = lean.Lean(model), prompt_of(40)
    with torch.inference_mode():
        stepped.prefill(ids[:, :30], 80)
        for start in range(30, 36):  # a step of a token and seven wrong guesses each
            guesses = torch.randint(0, 99, (7,), generator=torch.Generator().manual_seed(start))
            stepped.run(torch.cat((ids[0, start : start + 1], guesses)), start)
        logits = stepped.prefill(ids, 80)
        assert stepped.kept in (0, 36)
        torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_prompt_that_was_interrupted_is_not_kept(monkeypatch):
    model = small("llama", **BASE)
    stepped, ids = lean.Lean(model), prompt_of(40)
    with torch.inference_mode():
        stepped.prefill(ids[:, :30], 80)
        forward, calls = model.model.layers[1].forward, []

        def stopped(*arguments, **options):
            calls.append(1)
            raise KeyboardInterrupt

        model.model.layers[1].forward = stopped
        with pytest.raises(KeyboardInterrupt):
            stepped.prefill(torch.flip(ids, [1]), 80)
        model.model.layers[1].forward = forward
        logits = stepped.prefill(ids, 80)
        assert calls and stepped.kept == 0
        torch.testing.assert_close(logits, model(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_a_step_that_was_interrupted_is_not_kept(monkeypatch):
    """Ctrl-C in the second step of a new message, past a window that is full: its keys are in the cache, and no text says so."""
    model = small("mistral", **MODELS["mistral"])
    stepped, ids = lean.Lean(model), prompt_of(60)
    message = torch.cat((ids, torch.flip(prompt_of(24), [1])), 1)
    with torch.inference_mode():
        stepped.prefill(ids, 200)
        run, calls = stepped.step.run, []

        def stopping(*arguments):
            run(*arguments)
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(stepped.step, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            stepped.prefill(message, 200)
        monkeypatch.setattr(stepped.step, "run", run)
        other = torch.cat((message[:, :64], prompt_of(9)), 1)
        logits = stepped.prefill(other, 200)
        torch.testing.assert_close(logits, model(other).logits[:, -1], rtol=1e-4, atol=1e-4)
        assert len(calls) == 2


@pytest.mark.parametrize("options", [{"bits": 8}, {"bits": 8, "int8_activations": True}, {"bits": 4}])
def test_a_conversation_of_a_quantized_model(options):
    """Turn by turn it says what a new step says of the whole text. LLM.int8() in the paper's form reads each turn whole."""
    model, tokenizer = qcli.load(str(DEMO), device="cpu", dtype="float32", **({"int8_activations": None} | options))
    stepped, rules = lean.Lean(model), {"max_new_tokens": 10, "do_sample": False}
    ids = torch.tensor([tokenizer("One rainy day the goat")["input_ids"]])
    for text in (" went to the", " and the mouse"):
        answer = ours(model, ids, stepped, **rules)
        ids = torch.cat((ids, torch.tensor([answer]), torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])), 1)
        kept = ours(model, ids, stepped, **rules)
        assert (stepped.kept == 0) == (options.get("int8_activations") is True)
        if options["bits"] == 4:
            assert kept == ours(model, ids, lean.Lean(model), **rules)


def test_a_comparison_that_was_interrupted_is_made_again(monkeypatch):
    stepped, read = lean.Lean(small("llama", **BASE)), lean.Lean.read
    with monkeypatch.context() as stopped, torch.inference_mode():
        stopped.setattr(lean.Lean, "read", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            stepped.prepare()
    assert lean.Lean.read is read and stepped.step is None
    with torch.inference_mode():
        stepped.prepare()
    assert stepped.step is not None


def test_a_model_is_compared_once(monkeypatch):
    model = small("llama", **BASE)
    model.model.layers[0].mlp.forward = lambda x: 0 * x
    stepped, seen = lean.Lean(model), []
    monkeypatch.setattr(stepped, "read", lambda *a, **k: seen.append(1) or lean.Lean.read(stepped, *a, **k))
    for _ in range(2):
        with pytest.raises(Unsupported), torch.inference_mode():
            stepped.prepare()
    assert seen == [1]


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
        stepped.prefill(ids[None, :10], 40)
        one = torch.cat([stepped.run(ids[i : i + 1], i).clone() for i in range(10, 30)])
        stepped.prefill(ids[None, :10], 40)
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
        stepped.prefill(ids[:, :12], 40)
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
                module.rounds_activations = False
    ids = torch.tensor([tokenizer("One rainy day")["input_ids"]])
    options = {"max_new_tokens": 40, "do_sample": False}
    assert ours(model, ids, **options) == theirs(model, ids, **options)


@pytest.mark.parametrize("head", [8, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_that_is_tied_to_the_embedding(bits, head):
    model, tokenizer = qcli.load(str(DEMO), bits=bits, head=head, device="cpu", dtype="float32")
    for module in model.modules():
        if isinstance(module, Linear8bit):
            module.rounds_activations = False
    ids = torch.tensor([tokenizer("One rainy day")["input_ids"]])
    options = {"max_new_tokens": 40, "do_sample": False}
    stepped = lean.Lean(model)
    assert ours(model, ids, stepped, **options) == theirs(model, ids, **options)
    plain, _ = qcli.load(str(DEMO), bits=bits, device="cpu", dtype="bfloat16")
    quantized, _ = qcli.load(str(DEMO), bits=bits, head=head, device="cpu", dtype="bfloat16")
    rows, width = plain.lm_head.weight.shape
    saved = 2 * rows * width - sum(t.nbytes for t in (*quantized.lm_head.parameters(), *quantized.lm_head.buffers()))
    assert memory_limit.bytes_a_step(plain) - memory_limit.bytes_a_step(quantized) == saved > 0.4 * rows * width


def test_new_tokens_of_llm_int8_keep_their_activations():
    model, _ = qcli.load(str(DEMO), bits=8, device="cpu", int8_activations=None)
    modules = [module for module in model.modules() if isinstance(module, Linear8bit)]
    assert len(modules) == 42 and all(module.rounds_activations and not module.rounds_few for module in modules)
    assert isinstance(modules[0].for_few_tokens(), PreparedW8A16)
    x = torch.randn(40, modules[0].in_features)
    with torch.inference_mode():
        few, many = modules[0](x[:4]), modules[0](x)[:4]
        modules[0].rounds_activations = False
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
        stepped.prefill(ids, 40)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["cohere2", "smollm3", "glm", "llama"])
def test_rotation_is_found_where_attention_adds_little(name, dtype):
    """Every layer's kind of rotation, though attention makes up a hundredth of what the layer adds."""
    model = small(name, dtype, **MODELS[name])
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.01
    stepped = lean.Lean(model)
    with torch.inference_mode():
        stepped.prefill(prompt_of(20), 40)
    kinds = {"cohere2": ["interleaved"] * 3, "smollm3": ["halves", None, "halves"], "glm": ["interleaved by halves"] * 3}
    kinds["llama"] = ["halves"] * 3
    assert [block.attention.rope for block in stepped.step.blocks] == kinds[name]


@pytest.mark.parametrize(
    "name, setting",
    [
        ("olmo", {"clip_qkv": 8.0}),
        ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}),
    ],
)
def test_what_a_short_prompt_cannot_show_is_refused(name, setting):
    model = small("olmo" if name == "olmo" else "llama", **BASE | setting)
    with pytest.raises(Unsupported):
        lean.Lean(model)


def test_layers_with_angles_of_their_own_keep_them():
    """Two kinds of angles that hardly differ at the first positions."""
    scaled = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled["original_max_position_embeddings"] = 64
    plain = {"rope_type": "default", "rope_theta": 1e6}
    rope = {"sliding_attention": plain, "full_attention": scaled}
    model = small("gemma3_text", **MODELS["gemma3_text"] | {"rope_parameters": rope})
    stepped = lean.Lean(model)
    with torch.inference_mode():
        stepped.prefill(prompt_of(12), 40)
        tables = stepped.tables(300)
        for kind, (cos, _) in zip(model.config.layer_types, tables):
            expected = model.model.rotary_emb(torch.zeros(1), torch.arange(300)[None], kind)[0][0]
            assert torch.equal(cos, expected)
    assert not torch.equal(tables[0][0], tables[model.config.layer_types.index("full_attention")][0])


def test_a_cache_that_cannot_grow_stays_whole(monkeypatch):
    """As after Ctrl-C or out of memory between the new cache and its program."""
    monkeypatch.setattr(lean, "ROOM", 4)
    model = small("llama", **BASE)
    stepped, options = lean.Lean(model), {"max_new_tokens": 30, "do_sample": False}
    with monkeypatch.context() as patched:
        program = lean_step.Program

        def fail(ops):
            if stepped.step is not None:
                raise KeyboardInterrupt
            return program(ops)

        patched.setattr(lean_step, "Program", fail)
        with pytest.raises(KeyboardInterrupt):
            ours(model, prompt_of(9), stepped, **options)
    assert ours(model, prompt_of(11), stepped, **options) == theirs(model, prompt_of(11), **options)
