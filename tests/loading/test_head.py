"""A quantized output head, tied to the embedding or not: what is stored, who reads it, and what it computes."""

import json
import shutil

import pytest
import torch
import transformers
from bitsandbytes.functional import QuantState, dequantize_4bit
from safetensors.torch import load_file, save_file

import qcli
from qcli.errors import CheckpointError, PlanError, UsageError
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.quantized_embedding import QuantizedEmbedding
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.quantization.plan_json import from_json, to_json
from qcli.quantization.quantize import make_plan
from qcli.runtime import cpu
from tests.models import add_tokenizer, example_inputs, make_model, make_tied

TIED = ("llama-tied", "gemma3_text", "gpt2", "opt")
UNTIED = ("llama", "gpt_neox", "phi3", "gptj")


def made(name: str, folder, dtype=torch.float32) -> torch.nn.Module:
    """A random model, saved to `folder`. "-tied" ties its embeddings."""
    return (make_tied if name.endswith("-tied") else make_model)(name.removesuffix("-tied"), folder, dtype)


def decoded(folder) -> dict[str, torch.Tensor]:
    """Every weight of a quantized folder in float32: 4 bits by bitsandbytes, 8 bits by their definition."""
    stored, found = load_file(folder / "model.safetensors"), {}
    for name, tensor in stored.items():
        parts = {key.removeprefix(f"{name}."): value for key, value in stored.items() if key.startswith(f"{name}.")}
        if f"{name.removesuffix('weight')}SCB" in stored and name.endswith("weight"):
            scale = stored[f"{name.removesuffix('weight')}SCB"]
            found[name] = tensor.view(len(scale), -1) * (scale / 127)[:, None]
        elif parts:
            state = QuantState.from_dict({f"{name}.{key}": value for key, value in parts.items()}, device=torch.device("cpu"))
            found[name] = dequantize_4bit(tensor, state).float()
        elif not any(name.startswith(f"{other}.") for other in stored) and tensor.is_floating_point() and "SCB" not in name:
            found[name] = tensor.float()
    return found


def by_arithmetic(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A 4-bit weight from its tables, its absmax and its codes."""
    (blob,) = (bytes(tensor) for key, tensor in stored.items() if key.startswith(f"{name}.quant_state"))
    state, absmax = json.loads(blob), stored[f"{name}.absmax"]
    if f"{name}.nested_absmax" in stored:
        scale = stored[f"{name}.nested_absmax"].repeat_interleave(256)[: len(absmax)]
        absmax = stored[f"{name}.nested_quant_map"][absmax.int()] * scale + state["nested_offset"]
    codes = torch.stack((stored[name].view(-1) >> 4, stored[name].view(-1) & 15), 1).view(-1)
    values = stored[f"{name}.quant_map"][codes.int()] * absmax.repeat_interleave(state["blocksize"])[: len(codes)]
    return values.view(state["shape"])


def reference(folder, source) -> torch.nn.Module:
    """The model of `source` with the weights that `folder` stores, as transformers computes it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    weights = decoded(folder)
    conv1d = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    known = model.state_dict()
    weights = {n.replace("embed_out.", "lm_head."): tensor for n, tensor in weights.items()}  # as transformers 5 calls GPT-NeoX's
    state = {n if n in known else f"{model.base_model_prefix}.{n}": tensor for n, tensor in weights.items()}
    state = {name: tensor.t() if name in conv1d else tensor for name, tensor in state.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= model.all_tied_weights_keys.keys() | set(model.all_tied_weights_keys.values())
    model.tie_weights()
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(**example_inputs(model)).logits


@pytest.mark.parametrize("head", [8, 4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TIED + UNTIED)
def test_a_model_with_a_quantized_head_computes_what_is_stored(name, bits, head, tmp_path):
    made(name, tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=bits, head=head)
    ours, _ = qcli.load(str(tmp_path / "out"), dtype="float32", device="cpu", int8_activations=False if bits == 8 else None)
    expected = logits(reference(tmp_path / "out", tmp_path / "model"))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    of_head, embedding = ours.get_output_embeddings(), ours.get_input_embeddings()
    assert isinstance(of_head, QuantizedLinear) and of_head.scheme.bits == head and not of_head.rounds_activations
    if name in TIED:
        assert isinstance(embedding, QuantizedEmbedding) and embedding.weight is of_head.weight
        assert all(getattr(embedding, n) is getattr(of_head, n) for n in dict(of_head.named_parameters()))
        assert sum("embed" in n or "wte" in n or "lm_head" in n for n in decoded(tmp_path / "out") if "pos" not in n) == 1
    else:
        assert type(embedding) is torch.nn.Embedding


@pytest.mark.parametrize("head", [8, 4])
@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text", "llama"])
def test_quantized_while_it_is_read_it_is_the_same(name, head, tmp_path):
    made(name, tmp_path / "model", torch.bfloat16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=head)
    stored, _ = qcli.load(str(tmp_path / "out"), device="cpu", int8_activations=None)
    read, _ = qcli.load(str(tmp_path / "model"), bits=4, head=head, device="cpu", int8_activations=None)
    assert torch.equal(logits(stored), logits(read))
    tensors = [sum(t.nbytes for t in {id(t): t for t in (*m.parameters(), *m.buffers())}.values()) for m in (stored, read)]
    assert tensors[0] == tensors[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_transformers_with_bitsandbytes_reads_a_head_of_the_other_modules_bits(bits, tmp_path):
    made("llama", tmp_path / "model", torch.bfloat16)
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", bits=bits, head=bits)
    assert plan.format.name == "bitsandbytes" and plan.skip_modules == [] and not plan.notes
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=bits, head=bits)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert type(theirs.lm_head).__module__.startswith("bitsandbytes")
    ours, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    expected, found = logits(theirs).float(), logits(ours).float()
    assert (found - expected).abs().max() <= 0.03 * expected.abs().max()


@pytest.mark.parametrize("name, bits, head", [("llama-tied", 4, 4), ("llama-tied", 8, 8), ("llama", 4, 8), ("llama", 8, 4)])
def test_no_other_library_takes_the_codes_for_weights(name, bits, head, tmp_path, monkeypatch):
    made(name, tmp_path / "model", torch.bfloat16)
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", bits=bits, head=head)
    assert plan.format.name == "qcli" and plan.notes == ["qcli alone reads the result; with --head 16 others do, too"]
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=bits, head=head)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "qcli" and not any(key.startswith("load_in") for key in config)
    monkeypatch.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "qcli")  # as without qcli
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_bytes_without_a_quantized_head_are_those_of_before(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "a", bits=4)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "b", bits=4, head=16)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_rows_of_blocks_that_cross_them(tmp_path):
    """Rows of 48 in blocks of 64: an embedding looks its rows up in blocks that others share. (bitsandbytes fails on them.)"""
    config = transformers.LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=100, tie_word_embeddings=True
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    for number, options in enumerate(({}, {"double_quant": False}, {"block_size": 32}, {"method": "fp4"})):
        qcli.quantize(str(tmp_path / "model"), tmp_path / f"out{number}", head=4, **options)
        ours, _ = qcli.load(str(tmp_path / f"out{number}"), dtype="float32", device="cpu")
        ids = torch.tensor([[0, 99, 7, 7], [50, 1, 2, 98]])
        weight = by_arithmetic(load_file(tmp_path / f"out{number}" / "model.safetensors"), "model.embed_tokens.weight")
        found = ours.get_input_embeddings()(ids)
        torch.testing.assert_close(found, weight[ids], rtol=1e-5, atol=1e-7)
        assert found.shape == (2, 4, 48)


def test_a_plan_goes_to_json_and_back(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    again = from_json(json.loads(json.dumps(to_json(plan))))
    assert again.recipe == plan.recipe and again.work == plan.work and again.format is plan.format
    assert to_json(plan)["recipe"] == {"default": {"method": "nf4"}, "head": {"method": "llm-int8"}}


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_a_run_with_another_head_is_not_gone_on_with(name, tmp_path, monkeypatch):
    made(name, tmp_path / "model", torch.bfloat16)
    with monkeypatch.context() as stopped:
        stopped.setattr("qcli.quantization.staging.Staging.publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    for head, said in ((4, 'this run\'s is {"method": "nf4"}'), (16, "this run's is null")):
        with pytest.raises(PlanError, match="was started by a run that differs") as e:
            qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=head)
        assert 'its head was {"method": "llm-int8"}' in e.value.message and said in e.value.message
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_recipe_names_the_head(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    recipe = {"default": {"method": "llm-int8"}, "head": {"method": "nf4", "options": {"block_size": 32}}}
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", recipe=qcli.recipe.recipe_of(recipe, "it"))
    assert plan.schemes == {"llm-int8": 14, "nf4": 1}
    (head,) = [w for w in plan.work if w.linear and w.linear.module == "model.embed_tokens"]
    assert head.method.scheme.size == 32
    over = make_plan(str(tmp_path / "model"), tmp_path / "out", recipe=qcli.recipe.recipe_of(recipe, "it"), head=16)
    assert over.schemes == {"llm-int8": 14} and over.format.name == "bitsandbytes"


def test_4_and_8_bits_in_one_model(tmp_path):
    made("llama", tmp_path / "model")
    recipe = {"default": {"method": "nf4"}, "rules": [["*.down_proj", {"method": "llm-int8"}]], "format": "qcli"}
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", recipe=qcli.recipe.recipe_of(recipe, "it"))
    ours, _ = qcli.load(str(tmp_path / "out"), dtype="float32", device="cpu", int8_activations=False)
    expected = logits(reference(tmp_path / "out", tmp_path / "model"))
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)
    kinds = {m.scheme.name for m in ours.modules() if isinstance(m, QuantizedLinear)}
    assert kinds == {"nf4", "llm-int8"}
    stored, _ = qcli.load(str(tmp_path / "out"), device="cpu", int8_activations=False)
    asked = qcli.recipe.recipe_of(recipe, "it")
    read, _ = qcli.load(str(tmp_path / "model"), recipe=asked, device="cpu", int8_activations=False)
    assert torch.equal(logits(read), logits(stored))


def test_a_format_of_choice_that_cannot_hold_it(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    with pytest.raises(UsageError, match="bitsandbytes has no quantized embedding, and the head is tied to it"):
        make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, head=4, format="bitsandbytes")
    made("llama", tmp_path / "untied", torch.bfloat16)
    with pytest.raises(UsageError, match="bitsandbytes has one number of bits for all modules"):
        make_plan(str(tmp_path / "untied"), tmp_path / "out", bits=4, head=8, format="bitsandbytes")
    with pytest.raises(UsageError, match="the head cannot be rtn beside the rest: compressed-tensors has no quantized embedding"):
        make_plan(str(tmp_path / "model"), tmp_path / "out", method="rtn", group_size=32, head=4, format="compressed-tensors")


def test_a_head_in_compressed_tensors(tmp_path):
    model = made("llama", tmp_path / "model", torch.bfloat16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", method="rtn", group_size=32, head=4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    ours, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    ours.eval()
    assert isinstance(ours.lm_head, QuantizedLinear) and not torch.equal(logits(ours), logits(model))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0.02, atol=0.02)  # theirs multiply the weight in bfloat16


@pytest.mark.parametrize("name, reason", [("t5", "it is tied to more than the embedding of its input"), ("bert", "has none")])
def test_models_without_such_a_head(name, reason, tmp_path):
    if name == "bert":
        sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
        transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "model")
    else:
        make_model(name, tmp_path / "model")
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    assert any(reason in problem and "--head" in problem for problem in plan.problems)
    with pytest.raises(PlanError):
        plan.check()
    with pytest.raises(UsageError, match="no output head can be quantized"):
        qcli.load(str(tmp_path / "model"), bits=4, head=8, device="cpu")


def test_a_model_that_reads_the_dtype_of_its_heads_weight(tmp_path):
    """Mamba casts hidden states to the dtype of the head's weight: with codes in it they would become integers."""
    config = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=100, state_size=4)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    assert any("casts what it reads to the dtype of its weight" in problem for problem in plan.problems)


def test_what_rules_say_of_the_head(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    for glob in ("lm_head", "model.embed_tokens"):
        plan = make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8, skip=[glob])
        assert any("leave out --skip or --head" in problem for problem in plan.problems)
    recipe = {"default": {"method": "nf4"}, "rules": [["lm_head", {"method": "llm-int8"}]]}
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", recipe=qcli.recipe.recipe_of(recipe, "it"))
    assert any("'lm_head' is the output head, which no rule decides" in problem for problem in plan.problems)
    assert not make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, skip=["lm_head"]).problems
    assert not make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8, skip=["*.down_proj"]).problems


@pytest.mark.parametrize("name", ["llama-tied", "llama"])
def test_a_recipe_for_the_head_alone(name, tmp_path):
    made(name, tmp_path / "model")
    recipe = qcli.recipe.recipe_of({"default": {"method": "keep"}, "head": {"method": "nf4"}}, "it")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", recipe=recipe)
    ours, _ = qcli.load(str(tmp_path / "out"), dtype="float32", device="cpu")
    assert [m.scheme.name for m in ours.modules() if isinstance(m, QuantizedLinear)] == ["nf4"]
    torch.testing.assert_close(logits(ours), logits(reference(tmp_path / "out", tmp_path / "model")), rtol=1e-4, atol=1e-4)
    stored, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    read, _ = qcli.load(str(tmp_path / "model"), recipe=recipe, device="cpu")
    assert torch.equal(logits(read), logits(stored))


def test_the_name_of_a_folder_tells_the_head(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    assert str(make_plan(str(tmp_path / "model"), bits=4, head=8).output) == "model-nf4-head-8"
    assert str(make_plan(str(tmp_path / "model"), bits=8).output) == "model-llm-int8"


def test_what_others_would_read_without_a_quantized_head(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    mixed = {
        "default": {"method": "nf4"},
        "rules": [["*.down_proj", {"method": "llm-int8"}]],
        "head": {"method": "nf4"},
        "format": "qcli",
    }
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", recipe=qcli.recipe.recipe_of(mixed, "it"))
    assert plan.notes == ["qcli alone reads the result"]


def test_activations_of_a_head_are_rounded_where_bitsandbytes_would(tmp_path):
    """An untied head in LLM.int8() among others, in the paper's form alone; a tied one never."""
    made("llama", tmp_path / "untied", torch.bfloat16)
    made("llama-tied", tmp_path / "tied", torch.bfloat16)
    for name, asked, rounds in (("untied", True, True), ("untied", None, False), ("untied", False, False), ("tied", True, False)):
        qcli.quantize(str(tmp_path / name), tmp_path / "out", bits=8, head=8, overwrite=True)
        ours, _ = qcli.load(str(tmp_path / "out"), device="cpu", int8_activations=asked)
        assert ours.lm_head.rounds_activations == rounds


@pytest.mark.skipif(cpu.variant() is None, reason="plain torch copies tables")
def test_rows_copy_no_table_at_each_call(tmp_path, monkeypatch):
    """A copy from the host's memory would end the capture of a step on a GPU."""
    for name, block_size in (("llama-tied", 64), ("llama-tied", 2048)):
        made(name, tmp_path / "model", torch.bfloat16)
        ours, _ = qcli.load(str(tmp_path / "model"), bits=4, head=4, block_size=block_size, device="cpu")
        embedding = ours.get_input_embeddings()
        expected = embedding(torch.tensor([3, 7]))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "from_numpy", lambda array: pytest.fail("a table is copied"))
            assert torch.equal(embedding(torch.tensor([3, 7])), expected)


@pytest.mark.parametrize("head", [8, 4])
def test_instruments_read_a_quantized_head(head, quick_cli, tmp_path):
    """What is streamed block by block predicts what the whole model predicts."""
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    add_tokenizer(tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=head)
    (tmp_path / "text.txt").write_text("The goat and the mouse were proud of the moon. " * 5)
    result = qcli.evaluate(str(tmp_path / "out"), text=tmp_path / "text.txt", dtype="float32", device="cpu")
    ours, tokenizer = qcli.load(str(tmp_path / "out"), dtype="float32", device="cpu")
    ids = torch.tensor([tokenizer((tmp_path / "text.txt").read_text())["input_ids"]])
    losses = []
    with torch.inference_mode():
        for part in ids.split(64, 1):
            predicted = ours(part).logits[0, :-1].log_softmax(-1)
            losses.append(-predicted.gather(1, part[0, 1:, None])[:, 0])
    assert result.rows[0].quality.perplexity.value == pytest.approx(torch.cat(losses).mean().exp().item(), rel=0.02)
    done = quick_cli("inspect-outliers", "out", "--text", "text.txt")
    assert done.returncode == 0, done.stderr
    assert quick_cli("inspect-outliers", "out", "--weights-only").returncode in (0, 2)


def test_an_estimate_of_an_untied_head_in_one_column(quick_cli, tmp_path):
    made("llama", tmp_path / "model", torch.bfloat16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    done = quick_cli("estimate-memory", "out", "--json")
    found = json.loads(done.stdout)
    assert not any("output head" in sentence for sentence in found["assumed"])
    loaded, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    weight = next(part for part in found["methods"][0]["components"] if part["name"] == "weights")
    held = sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers()) if t.dtype != torch.float32 or t.dim() == 1)
    tables = 1088 * sum(isinstance(module, Linear4bit) for module in loaded.modules())  # which bitsandbytes keeps for each
    assert weight["bytes"] == pytest.approx(held + tables, rel=0.01)


def test_speed_is_not_of_another_model(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    add_tokenizer(tmp_path / "model")
    for option in ({"head": 8}, {"kv_dtype": "int8"}):
        with pytest.raises(UsageError, match="and --speed were both given"):
            qcli.evaluate(str(tmp_path / "model"), speed=True, **option)


def test_an_embedding_stored_beside_the_head_that_is_tied_to_it(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    assert any("the embedding that it is tied to is stored beside it" in problem for problem in plan.problems)
    del tensors["model.embed_tokens.weight"]  # the head alone: the same model
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    ours, _ = qcli.load(str(tmp_path / "out"), dtype="float32", device="cpu")
    expected = decoded(tmp_path / "out")["lm_head.weight"]
    torch.testing.assert_close(ours.get_input_embeddings()(torch.arange(256)), expected, rtol=1e-6, atol=0)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_a_damaged_head_is_refused(tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=8)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for number, change in enumerate(
        (
            {"model.embed_tokens.SCB": torch.ones(255)},
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"][:-1].clone()},
            {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"].view(256, 64)},
        )
    ):
        shutil.copytree(tmp_path / "out", tmp_path / f"bad{number}")
        save_file(tensors | change, tmp_path / f"bad{number}" / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="model.embed_tokens"):
            qcli.load(str(tmp_path / f"bad{number}"), device="cpu")


@pytest.mark.parametrize("command", ["quantize", "generate", "estimate-memory", "evaluate"])
def test_another_number_of_bits(command, quick_cli, tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    add_tokenizer(tmp_path / "model")
    more = {"generate": ["x", "--bits", "4"]}.get(command, [])
    done = quick_cli(command, "model", *more, "--head", "5")
    assert done.returncode == 2 and "head is 5, expected 16, 8 or 4" in done.stderr


def test_generate_takes_a_head_with_bits_alone(quick_cli, tmp_path):
    made("llama-tied", tmp_path / "model", torch.bfloat16)
    add_tokenizer(tmp_path / "model")
    done = quick_cli("generate", "model", "x", "--head", "4")
    assert done.returncode == 2 and "--head was given without --bits" in done.stderr
