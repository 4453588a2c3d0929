"""Folders as others lay them out: every verb takes the same files for the model, carries the rest, and says what it leaves."""

import json
import shutil

import pytest
import torch
import transformers as t
from safetensors.torch import save_file

from qcli.checkpoint.carried import Carried
from qcli.errors import QcliWarning
from tests.foreign import WORDS, edit, model_fixture, same_weights, template_fixture, tokens  # noqa: F401 (fixtures)

CARRIED = (
    "original/tokenizer.model",
    "original/params.json",
    "additional_chat_templates/tool_use.jinja",
    "1_Pooling/config.json",
    "tekken.json",
    "source.spm",
    "target.spm",
    "normalizer.json",
    "bpe.codes",
    "SYSTEM_PROMPT.txt",
    "LICENSE",
    "emoji.json",
    "modeling_own.py",
    "2_Dense/model.safetensors",
    "sentencepiece.bpe.model",
    "a file with blanks.txt",
)
LEFT = (
    "model.gguf",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "optimizer.pt",
    "original/consolidated.00.pth",
    "rust_model.ot",
    ".gitattributes",
    ".cache/huggingface/download/x.metadata",
    "model.fp16.safetensors",
    "fp16/model.safetensors.index.json",
    "__pycache__/modeling_own.cpython-311.pyc",
    "old-nf4/config.json",
    "old-nf4/tokenizer.json",
)


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
    assert done.returncode == 0 and "corpus.txt is not copied" in done.stderr.replace("\n", " ")
    assert not (tmp_path / "out/corpus.txt").exists()


def test_a_file_that_cannot_be_carried_ends_the_run_before_the_weights(model, quick_cli, monkeypatch):
    from qcli.checkpoint.source import Source
    from qcli.errors import CheckpointError
    from qcli.quantization import execute

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
    with pytest.warns(QcliWarning, match="the adapter beside the model is ignored"):
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
        assert done.returncode == 1 and "nothing says which of them is the model" in done.stderr.replace("\n", " ")


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
    assert done.returncode == 1 and "does not know its architecture (ZorglubForCausalLM)" in done.stderr.replace("\n", " ")


def test_what_a_hub_model_needs_to_run_is_known_by_name():
    """Of the files that go along, those that `generate` fetches: no papers, pictures and data."""
    needed = [
        "tokenizer.json",
        "tokenizer.model.v3",
        "tekken.json",
        "merges.txt",
        "source.spm",
        "chat_template.jinja",
        "modeling_own.py",
        "additional_chat_templates/tool_use.jinja",
        "generation_config.json",
        "qwen.tiktoken",
        "bpe.codes",
    ]
    others = ["paper.pdf", "figure.png", "train.jsonl", "archive.zip", "original/tokenizer.model", "data.parquet"]
    assert Carried([*needed, *others], []).to_run == needed
