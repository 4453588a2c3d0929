"""The files, byte by byte, against bitsandbytes and transformers."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor

import bitsandbytes.functional as F
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import qcli
from qcli.checkpoint.torch_file import read_header
from tests.models import add_tokenizer, make_model

Q = "model.layers.0.self_attn.q_proj"


def tensors(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: file.get_tensor(name) for name in file.keys()}
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64, 4096])
def test_4bit_tensors_equal_bitsandbytes(tmp_path, dtype, block_size):
    original = make_model("llama", tmp_path / "model", dtype)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", block_size=block_size, double_quant=False)
    stored = tensors(tmp_path / "out")
    weight = original.get_submodule(Q).weight.data
    packed, state = F.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    theirs = state.as_dict(packed=True)
    assert torch.equal(stored[f"{Q}.weight"], packed) and packed.shape[1] == 1
    assert torch.equal(stored[f"{Q}.weight.absmax"], state.absmax)
    assert torch.equal(stored[f"{Q}.weight.quant_map"], state.code)
    blob = "quant_state.bitsandbytes__nf4"
    assert bytes(stored[f"{Q}.weight.{blob}"]) == bytes(theirs[blob])


def test_double_quantization_equals_bitsandbytes_up_to_its_rounding(tmp_path):
    original = make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out")
    stored = tensors(tmp_path / "out")
    weight = original.get_submodule(Q).weight.data
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    assert torch.equal(stored[f"{Q}.weight"], packed)
    assert torch.equal(stored[f"{Q}.weight.nested_quant_map"], state.state2.code)
    torch.testing.assert_close(stored[f"{Q}.weight.nested_absmax"], state.state2.absmax, rtol=1e-5, atol=0)
    ours = json.loads(bytes(stored[f"{Q}.weight.quant_state.bitsandbytes__nf4"]))
    assert ours["nested_offset"] == pytest.approx(state.offset.item(), rel=1e-6)
    assert list(ours) == ["quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"]
    codes = stored[f"{Q}.weight.absmax"].int()
    assert (codes - state.absmax.int()).abs().max() <= 1  # its CPU path looks up a rounded value


def test_int8_tensors_equal_bitsandbytes_where_float16_holds_the_weights(tmp_path):
    original = make_model("llama", tmp_path / "model", torch.float16)
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=8)
    stored = tensors(tmp_path / "out")
    codes, scale, _ = F.int8_vectorwise_quant(original.get_submodule(Q).weight.data)
    assert torch.equal(stored[f"{Q}.weight"], codes) and torch.equal(stored[f"{Q}.SCB"], scale)
    assert stored[f"{Q}.SCB"].dtype == torch.float32
    weight_format = stored[f"{Q}.weight_format"]
    assert weight_format.dtype == torch.uint8 and weight_format.shape == () and weight_format.item() == 0


def test_the_same_tensors_and_config_fields_as_transformers_writes(tmp_path):
    make_model("llama", tmp_path / "model")
    for bits in (4, 8):
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=bits == 4,
            load_in_8bit=bits == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
        theirs.save_pretrained(tmp_path / f"theirs{bits}")
        qcli.quantize(str(tmp_path / "model"), tmp_path / f"ours{bits}", bits=bits)
        a, b = tensors(tmp_path / f"theirs{bits}"), tensors(tmp_path / f"ours{bits}")
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype, name
            if "quant_state" not in name:
                assert a[name].shape == b[name].shape, name
        ours = json.loads((tmp_path / f"ours{bits}/config.json").read_text())
        written = json.loads((tmp_path / f"theirs{bits}/config.json").read_text())
        fields = written["quantization_config"] | (
            {} if bits == 4 else {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
        )
        assert ours["quantization_config"] == fields
        assert ours["dtype"] == written["dtype"] == "bfloat16"
        assert '"llm_int8_threshold": 6.0' in (tmp_path / f"ours{bits}/config.json").read_text()


def test_odd_shapes(tmp_path):
    """A width that no block size divides, an odd number of weights: blocks straddle rows, the last is partial."""
    config = transformers.LlamaConfig(
        hidden_size=63, intermediate_size=101, num_hidden_layers=1, num_attention_heads=3, vocab_size=64, head_dim=34
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", double_quant=False)
    stored = tensors(tmp_path / "out")
    for name in ("mlp.down_proj", "mlp.up_proj", "self_attn.q_proj"):
        key = f"model.layers.0.{name}"
        packed, state = F.quantize_4bit(model.get_submodule(key).weight.data, quant_type="nf4")
        assert torch.equal(stored[f"{key}.weight"], packed) and torch.equal(stored[f"{key}.weight.absmax"], state.absmax)
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_chunks_give_the_same_bytes_as_the_whole(tmp_path, monkeypatch):
    from qcli.quantization import execute

    for architecture in ("llama", "gpt2"):
        make_model(architecture, tmp_path / architecture)
        for bits in (4, 8):
            monkeypatch.setattr(execute, "CHUNK_BYTES", 4 << 20)
            qcli.quantize(str(tmp_path / architecture), tmp_path / f"{architecture}{bits}whole", bits=bits)
            monkeypatch.setattr(execute, "CHUNK_BYTES", 1000)
            qcli.quantize(str(tmp_path / architecture), tmp_path / f"{architecture}{bits}parts", bits=bits)
            a, b = (tmp_path / f"{architecture}{bits}{kind}/model.safetensors" for kind in ("whole", "parts"))
            assert a.read_bytes() == b.read_bytes()


def test_shards(tmp_path):
    make_model("llama", tmp_path / "model", max_shard_size="50KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    qcli.quantize(str(tmp_path / "model"), tmp_path / "one")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "many", settings={"max_shard_size": "30kB"})
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert one.keys() == many.keys() and all(torch.equal(one[n], many[n]) for n in one)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == many.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in many.values())
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "many")


def test_skip_lists_say_the_same_to_transformers(tmp_path):
    import bitsandbytes as bnb

    make_model("llama", tmp_path / "model")
    skip = ["*.layers.1.self_attn.[qkv]_proj", "*.down_proj"]
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", skip=skip)
    listed = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["llm_int8_skip_modules"]
    assert "lm_head" in listed and "model.layers.1.self_attn.q_proj" in listed
    assert "model.layers.1.self_attn.qkv_proj" in listed  # vLLM's name for the three
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    converted = {n for n, m in loaded.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(converted) == 14 - 3 - 2 and not any("down_proj" in n for n in converted)
    # transformers 4 looks for an entry as a run of components anywhere in the name
    assert all(not any(f".{entry}." in f".{n}." for entry in listed) for n in converted)
    loaded(torch.arange(1, 9)[None])


def test_a_skip_pattern_that_matches_nothing_is_a_problem(tmp_path, quick_cli):
    make_model("llama", tmp_path / "model")
    done = quick_cli("quantize", "model", "--skip", "k_proj", "--skip", "nothing")
    assert done.returncode == 1 and "2 problems" in done.stderr
    assert "'k_proj' matches no module" in done.stderr and "'*.k_proj'" in done.stderr
    assert quick_cli("quantize", "model", "--skip", "lm_head", "--dry-run").returncode == 0


def test_dtypes(tmp_path):
    make_model("llama", tmp_path / "model", torch.float32)
    for dtype, expected, compute in (
        ("auto", torch.float32, "bfloat16"),
        ("float16", torch.float16, "float16"),
        ("bfloat16", torch.bfloat16, "bfloat16"),
    ):
        out = tmp_path / dtype
        qcli.quantize(str(tmp_path / "model"), out, dtype=dtype)
        stored = tensors(out)
        assert stored["model.norm.weight"].dtype == stored["lm_head.weight"].dtype == expected
        config = json.loads((out / "config.json").read_text())
        assert config["dtype"] == str(expected)[6:]
        assert config["quantization_config"]["bnb_4bit_compute_dtype"] == compute
        state = json.loads(bytes(stored[f"{Q}.weight.quant_state.bitsandbytes__nf4"]))
        assert state["dtype"] == str(expected)[6:]
    qcli.quantize(str(tmp_path / "model"), tmp_path / "set", settings={"compute_dtype": "float16"})
    config = json.loads((tmp_path / "set/config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float16"


def test_the_other_files_come_along(tmp_path):
    make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    for name in ("LICENSE.txt", "chat_template.jinja", "merges.txt"):
        (tmp_path / "model" / name).write_text(name)
    for name in ("pytorch_model.gguf", "model.onnx", "optimizer.pt", ".gitattributes"):
        (tmp_path / "model" / name).write_text(name)
    mask = os.umask(0o027)
    try:
        report = qcli.quantize(str(tmp_path / "model"), tmp_path / "out")
    finally:
        os.umask(mask)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "LICENSE.txt",
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "qcli.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not report.warnings
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {0o640}
    assert str(tmp_path) not in (tmp_path / "out/qcli.json").read_text() + (tmp_path / "out/README.md").read_text()


def test_a_missing_tokenizer_is_a_warning(tmp_path):
    make_model("llama", tmp_path / "model")
    assert "no tokenizer" in qcli.quantize(str(tmp_path / "model"), tmp_path / "out").warnings[0]


def test_tied_embeddings_stay_tied(tmp_path):
    make_model("gpt2", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out")
    assert not any("lm_head" in n for n in tensors(tmp_path / "out"))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()


def test_gpt2_is_stored_out_by_in(tmp_path):
    original = make_model("gpt2", tmp_path / "model", torch.float16)
    name = "transformer.h.0.attn.c_attn"
    weight = original.get_submodule(name).weight.data.T.contiguous()
    qcli.quantize(str(tmp_path / "model"), tmp_path / "four", double_quant=False)
    four = tensors(tmp_path / "four")
    packed, state = F.quantize_4bit(weight, quant_type="nf4")
    assert torch.equal(four[f"{name}.weight"], packed)
    assert json.loads(bytes(four[f"{name}.weight.quant_state.bitsandbytes__nf4"]))["shape"] == [192, 64]
    qcli.quantize(str(tmp_path / "model"), tmp_path / "eight", bits=8)
    codes, scale, _ = F.int8_vectorwise_quant(weight)
    eight = tensors(tmp_path / "eight")
    assert torch.equal(eight[f"{name}.weight"], codes) and torch.equal(eight[f"{name}.SCB"], scale)


def test_a_checkpoint_without_its_prefix(tmp_path):
    """The hub's gpt2 is stored as h.0..., without the `transformer.` of the class that its config names."""
    make_model("gpt2", tmp_path / "model")
    stripped = {n.removeprefix("transformer."): t for n, t in tensors(tmp_path / "model").items()}
    save_file(stripped, tmp_path / "model/model.safetensors", {"format": "pt"})
    report = qcli.quantize(str(tmp_path / "model"), tmp_path / "out")
    assert report.quantized_modules == 8
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, loaded(ids).logits, rtol=0.05, atol=0.05)


def test_measured_error_equals_the_error_of_what_was_stored(tmp_path):
    original = make_model("llama", tmp_path / "model", torch.float32)
    for bits, double_quant in ((4, True), (4, False), (8, None)):
        out = tmp_path / f"{bits}{double_quant}"
        report = qcli.quantize(str(tmp_path / "model"), out, bits=bits, double_quant=double_quant)
        stored = tensors(out)
        squares = {}
        for name, module in original.named_modules():
            if f"{name}.weight" not in stored or not isinstance(module, torch.nn.Linear) or name == "lm_head":
                continue
            if bits == 8:
                value = stored[f"{name}.weight"].double() * stored[f"{name}.SCB"].double()[:, None] / 127
            else:
                parts = {k.removeprefix(f"{name}.weight."): v for k, v in stored.items() if k.startswith(f"{name}.weight.")}
                state = F.QuantState.from_dict(parts, device="cpu")
                value = F.dequantize_4bit(stored[f"{name}.weight"], state).double()
            kind = squares.setdefault(name.rpartition(".")[2], [0.0, 0.0])
            kind[0] += (module.weight.double() - value).square().sum().item()
            kind[1] += module.weight.double().square().sum().item()
        assert {k.name for k in report.kinds} == squares.keys()
        for kind in report.kinds:
            error, norm = squares[kind.name]
            assert kind.errors.relative_error == pytest.approx((error / norm) ** 0.5, rel=2e-4)


def test_bin_checkpoints(tmp_path):
    from safetensors.torch import load_file

    make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "expected")
    state = load_file(tmp_path / "model/model.safetensors")
    torch.save(state, tmp_path / "model/pytorch_model.bin")
    (tmp_path / "model/model.safetensors").unlink()
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out")
    a, b = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_bin_checkpoints_read_by_one_thread_after_another(tmp_path):
    """Where torch was built for CUDA and there is none, its fake tensors may crash in the second thread."""
    torch.save({"w": torch.zeros(2, 3)}, tmp_path / "x.bin")
    for _ in range(3):
        with ThreadPoolExecutor(1) as pool:
            header = pool.submit(read_header, tmp_path / "x.bin", "x.bin", "x.bin").result()
        assert header.tensors["w"].shape == (2, 3)
