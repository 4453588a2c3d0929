"""Models whose weights and configs others wrote: every verb reads the same model, and refuses what would load wrongly."""

import json

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import qcli
from tests.foreign import WORDS, edit, model_fixture, same_weights, template_fixture, tokens  # noqa: F401 (fixtures)
from tests.models import add_tokenizer


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_weights(dtype, model, quick_cli, tmp_path):
    """The output is that of the same weights in bfloat16, which holds every one of them."""
    state = {k: v.to(dtype) if "proj" in k else v for k, v in load_file(model / "model.safetensors").items()}
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, model / "model.safetensors", {"format": "pt"})
    assert quick_cli("quantize", "model", "-o", "expected").returncode == 0
    assert quick_cli("quantize", "model", "--bits", "8", "-o", "expected8").returncode == 0
    expected = tokens(quick_cli("generate", "model", "hi", *WORDS))
    save_file(state, model / "model.safetensors", {"format": "pt"})
    assert quick_cli("quantize", "model", "-o", "out").returncode == 0
    assert quick_cli("quantize", "model", "--bits", "8", "-o", "out8").returncode == 0
    assert same_weights(tmp_path / "out", tmp_path / "expected")
    assert same_weights(tmp_path / "out8", tmp_path / "expected8")
    assert tokens(quick_cli("generate", "model", "hi", *WORDS)) == expected
    assert quick_cli("inspect-outliers", "model", "--weights-only").returncode == 0
    assert str(dtype).removeprefix("torch.") in quick_cli("info", "model").stdout


def test_float8_weights_with_scales_that_nothing_names(model, quick_cli):
    """Read without their scales they would be other weights."""
    state = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    state |= {name: state[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    save_file(state, model / "model.safetensors", {"format": "pt"})
    for verb in (["quantize"], ["generate", "hi"]):
        done = quick_cli(verb[0], "model", *verb[1:])
        assert done.returncode == 1 and f"{name}_scale_inv" in done.stderr.replace("\n", "")


def test_a_tied_weight_under_its_other_name(tmp_path, quick_cli):
    torch.manual_seed(0)
    small = dict(
        vocab_size=256,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        max_position_embeddings=64,
        decoder_start_token_id=2,
    )
    made = t.BartForConditionalGeneration(t.BartConfig(**small)).eval()
    made.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    state = load_file(path)
    state["model.decoder.embed_tokens.weight"] = state.pop("model.shared.weight")
    save_file(state, path, {"format": "pt"})
    done = quick_cli("quantize", "model", "-o", "out")
    assert done.returncode == 0, done.stderr
    loaded, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    assert torch.equal(loaded.model.shared.weight.float(), made.model.shared.weight.bfloat16().float()) or torch.equal(
        loaded.model.shared.weight, made.model.shared.weight
    )


def test_a_head_stored_in_place_of_the_embedding_it_is_tied_to(tmp_path, quick_cli):
    torch.manual_seed(0)
    config = t.Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    t.Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Once upon a time there was a mouse. " * 8)
    path = tmp_path / "model/model.safetensors"
    runs = []
    for _ in range(2):
        ids = tokens(quick_cli("generate", "model", "hi", *WORDS))
        rows = json.loads(quick_cli("evaluate", "model", "--text", "text.txt", "--json").stdout)["rows"]
        runs.append((ids, [row["quality"] for row in rows]))
        state = load_file(path)
        state["lm_head.weight"] = state.pop("model.embed_tokens.weight", None)
        save_file({k: v for k, v in state.items() if v is not None}, path, {"format": "pt"})
    assert runs[0] == runs[1]


# Config


def test_an_auto_map_whose_code_is_not_there_is_dropped(model, quick_cli, tmp_path):
    there = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "org/repo--modeling.Model"}
    gone = {"AutoModel": "modeling_gone.Model"}
    (model / "configuration_own.py").write_text("class Own: pass\n")
    edit(model / "config.json", auto_map=there | gone)
    edit(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_gone.Slow", None]})
    assert quick_cli("quantize", "model", "-o", "out").returncode == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == there
    assert "auto_map" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (tmp_path / "out/configuration_own.py").exists()
    (model / "configuration_own.py").unlink()
    edit(model / "config.json", auto_map={"AutoConfig": "configuration_own.Own"})
    assert quick_cli("quantize", "model", "-o", "bare").returncode == 0
    assert "auto_map" not in json.loads((tmp_path / "bare/config.json").read_text())


@pytest.mark.parametrize(
    "config, stored, expected",
    [
        ({"dtype": "float16"}, {"BF16": 9}, "F16"),
        ({"torch_dtype": "torch.float16"}, {"BF16": 9}, "F16"),
        ({"text_config": {"dtype": "float16"}}, {"BF16": 9}, "F16"),
        ({"vision_config": {"dtype": "float32"}, "text_config": {"dtype": "bfloat16"}}, {"BF16": 9, "F32": 1}, "BF16"),
        ({"vision_config": {"dtype": "float32"}, "text_config": {"dtype": "bfloat16"}}, {"BF16": 1, "F32": 9}, "F32"),
        ({"thinker_config": {"text_config": {"dtype": "float16"}}}, {"F32": 9}, "F16"),
        ({"audio_config": {"dtype": "float32"}}, {"BF16": 9}, "BF16"),
        ({"dtype": "bfloat16", "text_config": {"dtype": "float32"}}, {"F32": 9}, "BF16"),
        ({}, {"F16": 2, "F32": 1}, "F16"),
        ({"dtype": "float8_e4m3fn"}, {"F8_E4M3": 9, "F16": 1}, "BF16"),
        ({"dtype": None, "text_config": {"dtype": None}}, {"F16": 2}, "F16"),
    ],
)
def test_the_dtype_of_a_model_of_parts(config, stored, expected):
    from types import SimpleNamespace

    from qcli.checkpoint.model_dtype import model_dtype
    from qcli.checkpoint.safetensors_file import TensorInfo

    tensors = {code: TensorInfo("file", code, code, (count,), 0, 0) for code, count in stored.items()}
    assert model_dtype(SimpleNamespace(config=config, tensors=tensors, label="model"), "auto") == expected


def test_infinity_as_transformers_writes_it(tmp_path):
    config = t.Mamba2Config(
        hidden_size=64, num_hidden_layers=2, vocab_size=256, num_heads=8, head_dim=16, state_size=16, n_groups=1, expand=2
    )
    t.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "model")
    assert "Infinity" in (tmp_path / "model/config.json").read_text()
    loaded, _ = qcli.load(str(tmp_path / "model"), device="cpu")
    assert loaded.config.time_step_limit[1] == float("inf")


def test_a_foreign_infinity_in_json(model, quick_cli):
    """JSON has no infinity. What a checkpoint states is shown as a word."""
    edit(model / "config.json", quantization_config={"quant_method": "odd", "a": float("inf"), "b": [{"c": float("nan")}]})
    done = quick_cli("info", "model", "--json")
    assert json.loads(done.stdout)["quantization_config"] == {"quant_method": "odd", "a": "inf", "b": [{"c": "nan"}]}


@pytest.mark.parametrize("named", [["LLaMAForCausalLM"], ["OfAFineTune"], ["PreTrainedTokenizerFast"], None])
def test_an_architecture_of_another_name(named, model, quick_cli, tmp_path):
    """Where transformers has no class of the name, model_type decides, for every verb."""
    quick_cli("quantize", "model", "-o", "expected")
    expected = tokens(quick_cli("generate", "model", "hi", *WORDS))
    edit(model / "config.json", architectures=named)
    assert tokens(quick_cli("generate", "model", "hi", *WORDS)) == expected
    assert quick_cli("quantize", "model", "-o", "out").returncode == 0
    assert same_weights(tmp_path / "out", tmp_path / "expected")


OWN = """from transformers import LlamaForCausalLM
class {name}(LlamaForCausalLM):
    own = True
"""


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OwnModel"])
@pytest.mark.parametrize("stated", [["LlamaForCausalLM"], ["Another"], None])
def test_code_that_is_trusted_is_what_runs(name, stated, model):
    (model / "modeling_own.py").write_text(
        OWN.format(name=name) if name == "OwnModel" else OWN.format(name="Made") + f"{name} = Made\n"
    )
    edit(model / "config.json", architectures=stated, auto_map={"AutoModelForCausalLM": f"modeling_own.{name}"})
    assert qcli.load(str(model), device="cpu", trust_remote_code=True)[0].own
    assert not hasattr(qcli.load(str(model), device="cpu")[0], "own")


def test_ids_of_a_language_model_within_another(tmp_path):
    """Without generation_config.json: as transformers itself derives them."""
    small = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        head_dim=16,
        eos_token_id=7,
    )
    vision = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14)
    config = t.Gemma3Config(text_config=small, vision_config=vision, mm_tokens_per_image=4, image_token_index=299)
    t.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink()
    theirs = t.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "model").generation_config
    ours = qcli.load(str(tmp_path / "model"), device="cpu")[0].generation_config
    assert (ours.eos_token_id, ours.bos_token_id, ours.pad_token_id) == (
        theirs.eos_token_id,
        theirs.bos_token_id,
        theirs.pad_token_id,
    )


@pytest.mark.parametrize("bits", [None, 4])
def test_a_quantization_config_without_content(bits, model):
    edit(model / "config.json", quantization_config={})
    assert qcli.load(str(model), device="cpu", bits=bits)[0].config.model_type == "llama"


@pytest.mark.parametrize("field", ["num_hidden_layers", "num_labels"])
@pytest.mark.parametrize("verb", [["quantize"], ["generate", "hi"], ["inspect-outliers", "--weights-only"], ["info"]])
def test_a_size_that_the_headers_do_not_hold(field, verb, model, quick_cli):
    edit(model / "config.json", **{field: 2**31})
    done = quick_cli(verb[0], "model", *verb[1:])
    assert done.returncode == 1 and f"{field} is 2,147,483,648" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("layers", [0, -1])
@pytest.mark.parametrize("verb", [["quantize"], ["generate", "hi"], ["evaluate"], ["inspect-outliers"], ["info"]])
def test_a_model_without_layers(layers, verb, model, quick_cli):
    edit(model / "config.json", num_hidden_layers=layers)
    done = quick_cli(verb[0], "model", *verb[1:])
    assert done.returncode == 1 and f"num_hidden_layers is {layers}, expected at least 1" in done.stderr.replace("\n", " ")


def test_a_decoder_without_layers_under_another_name(tmp_path, quick_cli):
    config = t.BartConfig(
        d_model=64,
        decoder_layers=2,
        decoder_ffn_dim=128,
        decoder_attention_heads=4,
        vocab_size=256,
        max_position_embeddings=512,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    t.BartForCausalLM(config).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    edit(tmp_path / "model/config.json", decoder_layers=0)
    for verb in ("evaluate", "inspect-outliers"):
        done = quick_cli(verb, "model", "--tokens", "300")
        assert done.returncode == 1 and "BartForCausalLM has no layers by its config.json" in done.stderr.replace("\n", " ")


def test_a_layer_count_beyond_the_stored_layers(model, quick_cli):
    edit(model / "config.json", num_hidden_layers=200)
    for verb in (["quantize"], ["generate", "hi"]):
        done = quick_cli(verb[0], "model", *verb[1:])
        assert done.returncode == 1 and len(done.stderr) < 900, done.stderr
        assert "model.layers.10.input_layernorm.weight" in done.stderr.replace("\n", "")


def test_a_model_of_more_modules_than_tensors_is_not_built(model, quick_cli, monkeypatch):
    from qcli.checkpoint import modules as linears

    monkeypatch.setattr(linears, "_MODULES_AT_LEAST", 0)
    monkeypatch.setattr(linears, "_MODULES_A_TENSOR", 1)
    edit(model / "config.json", a_field_of_its_own=1)  # so that the model is built
    done = quick_cli("quantize", "model")
    assert done.returncode == 1 and "its numbers make more than 21 modules" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize("width", [2**40, 2**62])
def test_a_width_beyond_all_memory(width, model, quick_cli):
    edit(model / "config.json", intermediate_size=width)
    for verb in (["quantize"], ["generate", "hi"]):
        done = quick_cli(verb[0], "model", *verb[1:])
        assert done.returncode == 1 and "Traceback" not in done.stderr


def test_a_carried_tensor_that_is_not_finite_is_no_block(model, quick_cli):
    state = load_file(model / "model.safetensors")
    state["model.norm.weight"][0] = torch.nan
    save_file(state, model / "model.safetensors", {"format": "pt"})
    done = quick_cli("quantize", "model")
    assert done.returncode == 1 and "It is not quantized" in done.stderr.replace("\n", " ") and "block" not in done.stderr
    done = quick_cli("quantize", "model", "--bits", "8", "--set", "allow_nonfinite=true")
    assert done.returncode == 0


@pytest.mark.parametrize("value", [False, ""])
def test_a_config_that_asks_for_bare_tuples(value, model, tmp_path):
    """`return_dict` says in what form outputs come, and changes no number."""
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 20)
    usual = qcli.evaluate(str(model), text=text, device="cpu").rows[0].quality.loss.value
    edit(model / "config.json", return_dict=value)
    assert qcli.evaluate(str(model), text=text, device="cpu").rows[0].quality.loss.value == usual
