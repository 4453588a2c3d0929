"""Models as others lay them out: every verb takes the same files for the model, and says what it leaves."""

import json
import shutil

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

import qcli
from qcli.errors import QcliWarning
from tests.models import add_tokenizer, make_model

WORDS = ["--max-new-tokens", "4", "--json"]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "model"
    make_model("llama", folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def model(template, tmp_path):
    shutil.copytree(template, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **fields):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def weights(folder):
    """Every tensor of a folder's safetensors files."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def same_weights(first, second):
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tokens(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["token_ids"]


# Files that come along


CARRIED = (
    "original/tokenizer.model", "original/params.json", "additional_chat_templates/tool_use.jinja", "1_Pooling/config.json",
    "tekken.json", "source.spm", "target.spm", "normalizer.json", "bpe.codes", "SYSTEM_PROMPT.txt", "LICENSE", "emoji.json",
    "modeling_own.py", "2_Dense/model.safetensors", "sentencepiece.bpe.model", "a file with blanks.txt",
)  # fmt: skip
LEFT = (
    "model.gguf", "onnx/model.onnx", "onnx/model.onnx_data", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack",
    "optimizer.pt", "original/consolidated.00.pth", "rust_model.ot", ".gitattributes", ".cache/huggingface/download/x.metadata",
    "model.fp16.safetensors", "fp16/model.safetensors.index.json", "__pycache__/modeling_own.cpython-311.pyc",
    "old-nf4/config.json", "old-nf4/tokenizer.json",
)  # fmt: skip


def test_everything_but_weights_in_another_form_comes_along(model, quick_cli, tmp_path):
    for name in (*CARRIED, *LEFT, "old-nf4/qcli.json", "README.md"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(name.encode())
    edit(model / "modules.json")
    (model / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
    plan = json.loads(quick_cli("quantize", "model", "--dry-run", "--json").stdout)
    done = quick_cli("quantize", "model", "-o", "out")
    assert done.returncode == 0, done.stderr
    for name in CARRIED:
        assert (tmp_path / "out" / name).read_bytes() == name.encode(), name
    assert not [name for name in LEFT if (tmp_path / "out" / name).exists()]
    assert (tmp_path / "out/README.md").read_text().startswith("---")
    assert set(CARRIED) <= set(plan["carried_files"]) and not set(LEFT) & set(plan["carried_files"])
    assert "original/tokenizer.model" in quick_cli("quantize", "model", "--dry-run", "-o", "x").stdout.replace("\n", "")


def test_a_file_too_large_is_left_and_named(model, quick_cli, monkeypatch, tmp_path):
    from qcli.checkpoint import carried

    monkeypatch.setattr(carried, "MOST_BYTES", 1_000_000)
    (model / "corpus.txt").write_bytes(bytes(1_000_001))
    done = quick_cli("quantize", "model", "-o", "out")
    assert done.returncode == 0 and "corpus.txt is not carried over" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out/corpus.txt").exists()


def test_a_file_that_cannot_be_carried_ends_the_run_before_the_weights(model, quick_cli, monkeypatch):
    from qcli.checkpoint import execute
    from qcli.checkpoint.source import Source
    from qcli.errors import CheckpointError

    def unreadable(self, name):
        raise CheckpointError(f"cannot read {self.label}/{name}: Permission denied", "Check its permissions.")

    monkeypatch.setattr(Source, "carried_bytes", unreadable)
    monkeypatch.setattr(execute, "execute", lambda *_: pytest.fail("weights were read"))
    done = quick_cli("quantize", "model", "-o", "out")
    assert done.returncode == 1 and "Permission denied" in done.stderr and "space" not in done.stderr


# Which files are the model


def test_an_adapter_beside_the_model_is_left_out_by_all(model, quick_cli, tmp_path):
    plain = tokens(quick_cli("generate", "model", "hi", *WORDS))
    quick_cli("quantize", "model", "-o", "expected")
    edit(model / "adapter_config.json", base_model_name_or_path="a/b", peft_type="LORA", r=4, target_modules=["q_proj"])
    adapter = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{x}.weight": torch.ones(s)
        for x, s in (("A", (4, 64)), ("B", (64, 4)))
    }
    save_file(adapter, model / "adapter_model.safetensors")
    with pytest.warns(QcliWarning, match="the adapter beside the model is left out"):
        assert tokens(quick_cli("generate", "model", "hi", *WORDS)) == plain
    with pytest.warns(QcliWarning):
        assert quick_cli("generate", "model", "hi", "--bits", "4", *WORDS).returncode == 0
    assert quick_cli("quantize", "model", "-o", "out").returncode == 0
    assert same_weights(tmp_path / "out", tmp_path / "expected")
    assert not (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.parametrize("verb", ["info", "quantize", "generate", "estimate-memory"])
@pytest.mark.parametrize("has_config", [True, False])
def test_a_folder_that_is_an_adapter(verb, has_config, model, quick_cli):
    (model / "model.safetensors").unlink()
    edit(model / "adapter_config.json", base_model_name_or_path="org/base", peft_type="LORA")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}, model / "adapter_model.safetensors")
    if not has_config:
        (model / "config.json").unlink()
    elif verb == "estimate-memory":
        pytest.skip("config.json alone can be estimated")
    done = quick_cli(verb, "model", *(["x"] if verb == "generate" else []))
    assert done.returncode == 1 and "an adapter" in done.stderr and "merge" in done.stderr.replace("\n", " ")
    assert len(done.stderr) < 400


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "weights.safetensors"])
def test_one_file_of_another_name(name, model, quick_cli, tmp_path):
    expected = tokens(quick_cli("generate", "model", "hi", *WORDS))
    quick_cli("quantize", "model", "-o", "expected")
    (model / "model.safetensors").rename(model / name)
    assert tokens(quick_cli("generate", "model", "hi", *WORDS)) == expected
    assert quick_cli("quantize", "model", "-o", "out").returncode == 0
    assert same_weights(tmp_path / "out", tmp_path / "expected")
    assert quick_cli("info", "model").returncode == quick_cli("estimate-memory", "model").returncode == 0


def test_shards_of_a_variant(model, quick_cli, tmp_path):
    quick_cli("quantize", "model", "-o", "expected")
    loaded = t.LlamaForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="100KB", variant="fp16")
    assert (model / "model.safetensors.index.fp16.json").exists()
    assert quick_cli("quantize", "model", "-o", "out").returncode == 0
    assert same_weights(tmp_path / "out", tmp_path / "expected")
    assert quick_cli("generate", "model", "hi", *WORDS).returncode == 0


def test_two_files_and_no_index(model, quick_cli):
    (model / "model.safetensors").rename(model / "model.fp16.safetensors")
    shutil.copy(model / "model.fp16.safetensors", model / "model.fp32.safetensors")
    for verb in (["info"], ["quantize"], ["generate", "hi"]):
        done = quick_cli(verb[0], "model", *verb[1:])
        assert done.returncode == 1 and "which of them is the model is not stated" in done.stderr.replace("\n", " ")


def test_the_root_of_a_cache(model, tmp_path, quick_cli):
    snapshot = tmp_path / "models--org--name/snapshots/0123abcd"
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    done = quick_cli("info", "models--org--name")
    assert done.returncode == 1 and "models--org--name/snapshots/0123abcd" in done.stderr.replace("\n", "")


def test_a_config_in_a_subfolder_is_pointed_at(model, tmp_path, quick_cli):
    (tmp_path / "download").mkdir()
    model.rename(tmp_path / "download/llama")
    assert "download/llama" in quick_cli("info", "download").stderr


def test_a_byte_order_mark(model, quick_cli, tmp_path):
    expected = tokens(quick_cli("generate", "model", "hi", *WORDS))
    quick_cli("quantize", "model", "-o", "expected")
    for name in ("config.json", "generation_config.json"):
        (model / name).write_bytes(b"\xef\xbb\xbf" + (model / name).read_bytes())
    assert tokens(quick_cli("generate", "model", "hi", *WORDS)) == expected
    assert quick_cli("quantize", "model", "-o", "out").returncode == 0
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "expected/config.json").read_bytes()
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 20)
    assert quick_cli("evaluate", "model", "--text", "text.txt").returncode == 0


def test_what_transformers_does_not_know(model, quick_cli):
    edit(model / "config.json", model_type="zorglub", architectures=["ZorglubForCausalLM"])
    done = quick_cli("generate", "model", "hi")
    assert done.returncode == 1 and "does not know its architecture (ZorglubForCausalLM)" in done.stderr.replace(
        "\n", " "
    )


# Weights


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
        vocab_size=256, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64, decoder_start_token_id=2,
    )  # fmt: skip
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
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
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

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.quantization import model_dtype

    tensors = {code: ("file", TensorInfo(code, code, (count,), 0, 0)) for code, count in stored.items()}
    assert model_dtype(SimpleNamespace(config=config, tensors=tensors, label="model"), "auto") == expected


def test_infinity_as_transformers_writes_it(tmp_path):
    config = t.Mamba2Config(
        hidden_size=64,
        num_hidden_layers=2,
        vocab_size=256,
        num_heads=8,
        head_dim=16,
        state_size=16,
        n_groups=1,
        expand=2,
    )
    t.Mamba2ForCausalLM(config).save_pretrained(tmp_path / "model")
    assert "Infinity" in (tmp_path / "model/config.json").read_text()
    loaded, _ = qcli.load(str(tmp_path / "model"), device="cpu")
    assert loaded.config.time_step_limit[1] == float("inf")


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
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=300,
        head_dim=16, eos_token_id=7,
    )  # fmt: skip
    vision = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
    )
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


def test_a_layer_count_beyond_the_stored_layers(model, quick_cli):
    edit(model / "config.json", num_hidden_layers=200)
    for verb in (["quantize"], ["generate", "hi"]):
        done = quick_cli(verb[0], "model", *verb[1:])
        assert done.returncode == 1 and len(done.stderr) < 900, done.stderr
        assert "model.layers.10.input_layernorm.weight" in done.stderr.replace("\n", "")


def test_a_model_of_more_modules_than_tensors_is_not_built(model, quick_cli, monkeypatch):
    from qcli.checkpoint import linears

    monkeypatch.setattr(linears, "_MODULES_AT_LEAST", 0)
    monkeypatch.setattr(linears, "_MODULES_A_TENSOR", 1)
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
    assert (
        done.returncode == 1 and "It is not quantized" in done.stderr.replace("\n", " ") and "block" not in done.stderr
    )
    done = quick_cli("quantize", "model", "--bits", "8", "--set", "allow_nonfinite=true")
    assert done.returncode == 0
