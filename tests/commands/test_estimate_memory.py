"""`qcli estimate-memory` as its users meet it: verdicts and exit codes, what fits, splits, the paper's table, what is refused."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import qcli
from qcli import formats
from qcli.memory.components import Costs
from qcli.memory.placing import verdict
from qcli.memory.placing.hardware import gpus
from qcli.nn.linear_4bit import Linear4bit
from tests.conftest import ROOT
from tests.hub_server import running_hub
from tests.models import make_model, make_tied

DEMO = ROOT / "examples/demo-model"
LLAMA_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture
def config(tmp_path):
    """Llama-3.1-8B's config, as a file."""
    path = tmp_path / "llama-8b.json"
    path.write_text(json.dumps(LLAMA_8B))
    return path


@pytest.fixture
def estimate(quick_cli, config):
    return lambda *options: quick_cli("estimate-memory", config, *options)


def found(done) -> dict:
    assert done.returncode in (0, 3), done.stderr
    return json.loads(done.stdout)


def test_the_exit_code_tells_scripts_whether_it_fits(estimate):
    assert estimate().returncode == 0
    assert estimate("--gpu", "rtx4090").returncode == 0
    assert estimate("--gpu", "rtx4090", "--bits", "16", "--context", "131072").returncode == 3
    assert estimate("--gpu", "6GB", "--bits", "16").returncode == 3
    assert estimate("--gpu", "6GB", "--bits", "16", "--bits", "8", "--json").returncode == 3
    assert estimate("--gpu", "6XB").returncode == 2


def test_components_sum_to_the_total_and_are_explained(estimate):
    for method in found(estimate("--json", "--context", "8192"))["methods"]:
        known = sum(part["bytes"] for part in method["components"])
        for how in ("least", "likely", "most"):
            assert method["total"][how] == known + method["overhead"][how]
        assert method["total"]["least"] < method["total"]["likely"] < method["total"]["most"]
        assert all(part["formula"] for part in method["components"])
    text = estimate("--explain").stdout
    assert "8,030,261,248 parameters" in text and "32 layers x (8 heads x (128 + 128)" in text
    assert "8,192 tokens) x 1 sequences = 1,073,741,824 bytes" in text and "up projection [14336, 4096]" in text


def test_training_has_words_of_its_own(estimate):
    text = estimate("--explain", "--train", "qlora", "--gpu", "2x24GB").stdout
    assert "training state" in text and "cache" not in text
    assert "\n  float32 casts: 2.10 GB\n    1,050,939,392 parameters" in text
    assert "\n    16 x (in + out) over 224 linear layers = 41,943,040 parameters" in text


def test_what_a_prompt_holds_beyond_the_windows_is_explained(quick_cli, tmp_path):
    path = tmp_path / "mistral.json"
    path.write_text(json.dumps(LLAMA_8B | {"model_type": "mistral", "sliding_window": 4096}))
    text = quick_cli("estimate-memory", path, "--explain", "--bits", "16", "--context", "8192").stdout
    assert "in it 537 MB of keys and values beyond the windows" in text  # 32 layers x 4096 tokens x 4096 bytes


def test_scripts_find_the_keys_that_are_promised(estimate):
    report = found(estimate("--gpu", "6GB", "--bits", "16", "--json"))
    assert set(report) == {"model", "setting", "gpus", "fits", "assumed", "notes", "methods"}
    assert set(report["model"]) == {"name", "type", "parameters", "layers", "max_context", "read"}
    assert set(report["setting"]) == {"context", "batch", "dtype", "kv_dtype", "runtime", "train", "rank", "head"}
    assert [set(gpu) for gpu in report["gpus"]] == [{"name", "memory", "said"}]
    (method,) = report["methods"]
    assert set(method) == {
        "method",
        "bits_per_weight",
        "components",
        "overhead",
        "total",
        "verdict",
        "left",
        "split",
        "gpus",
        "largest_context",
        "largest_batch",
        "advice",
    }
    assert set(method["gpus"][0]) == {"gpu", "holds", "weights", "state", "activations", "overhead", "left"}
    assert set(method["largest_context"]) == {"value", "bound"} and set(method["advice"]) == {"options", "count", "on_cpu"}
    assert not {"verdict", "gpus", "advice"} & set(found(estimate("--json"))["methods"][0])


def test_weights_and_cache_are_exact(estimate):
    methods = {m["method"]: m for m in found(estimate("--json", "--context", "1000", "--batch", "3"))["methods"]}
    parts = {name: {p["name"]: p["bytes"] for p in m["components"]} for name, m in methods.items()}
    assert parts["bfloat16"]["weights"] == 2 * 8_030_261_248
    assert 9.08e9 < parts["llm-int8"]["weights"] < 9.09e9 and 5.70e9 < parts["nf4"]["weights"] < 5.71e9
    assert {p["cache"] for p in parts.values()} == {131_072 * 1000 * 3}


def test_a_dtype_is_that_of_the_cache_and_the_activations_too(quick_cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"dtype": "float32"}))
    options = ("--context", "1000", "--json")
    full, half, *quantized = found(quick_cli("estimate-memory", "config.json", *options))["methods"]
    assert (full["method"], half["method"]) == ("float32", "bfloat16")
    assert [p["bytes"] for p in full["components"]] == [2 * p["bytes"] for p in half["components"]]
    for method in quantized:
        assert method["components"][1]["bytes"] == half["components"][1]["bytes"] == 131_072_000
    (fp8,) = found(quick_cli("estimate-memory", "config.json", "--bits", "4", "--kv-dtype", "fp8", *options))["methods"]
    assert fp8["components"][1]["bytes"] == 65_536_000


def test_what_is_said_to_fit_is_the_largest_that_does():
    estimated = qcli.estimate_memory(str(DEMO), gpu=["2GB"], batch=2)
    asked = estimated.setting
    for row in estimated.methods:
        costs, device = Costs(estimated.model, row.method, asked.dtype), gpus(["2GB"])
        assert row.context.value == 512 and row.context.bound == "the model's limit"
        assert row.batch.bound == "memory" and row.batch.value > 2
        assert verdict.fits(costs.needs(replace(asked, batch=row.batch.value), device), device)
        assert not verdict.fits(costs.needs(replace(asked, batch=row.batch.value + 1), device), device)


def test_advice_is_true(estimate):
    """What is advised is tried: it fits, and one GPU fewer does not."""
    (row,) = found(estimate("--gpu", "rtx3080", "--bits", "16", "--json"))["methods"]
    assert row["verdict"] == "does not fit" and row["left"] < 0
    count, options = row["advice"]["count"], row["advice"]["options"]
    assert "--bits nf4" in options and count > 1
    for option in options:
        assert estimate("--gpu", "rtx3080", *option.split()).returncode == 0
    assert estimate("--gpu", f"{count}xrtx3080", "--bits", "16").returncode == 0
    assert estimate("--gpu", f"{count - 1}xrtx3080", "--bits", "16").returncode == 3
    assert 0 < row["advice"]["on_cpu"] < 2 * 8_030_261_248
    text = estimate("--gpu", "rtx3080", "--bits", "16").stdout
    for words in ("does not fit; what would: --bits", f"--gpu {count}xrtx3080", "in the CPU's memory", "short"):
        assert words in text


def test_a_smaller_context_is_advised_where_that_is_enough(estimate):
    text = estimate("--gpu", "24GB", "--bits", "16", "--context", "131072").stdout
    context = re.search(r"what would: --context (\d+)", text)[1]
    assert estimate("--gpu", "24GB", "--bits", "16", "--context", context).returncode == 0
    assert estimate("--gpu", "24GB", "--bits", "16", "--context", int(context) + 1).returncode == 3


def test_the_split_over_several_gpus(estimate):
    report = found(estimate("--gpu", "2x12GB", "--bits", "16", "--json"))
    (row,) = report["methods"]
    assert row["verdict"] == "fits" and len(row["gpus"]) == 2
    assert row["gpus"][0]["holds"].startswith("embedding, layers 0-") and row["gpus"][1]["holds"].endswith("31, head")
    assert sum(gpu["weights"] for gpu in row["gpus"]) == 2 * 8_030_261_248
    assert sum(gpu["state"] for gpu in row["gpus"]) == 131_072 * 8192
    assert row["left"] == min(gpu["left"] for gpu in row["gpus"]) >= 0
    text = estimate("--gpu", "2x12GB", "--bits", "16").stdout
    assert "2 x 12GB" in text and "embedding, layers 0-" in text and "bfloat16 GPU 1" in text


def test_bars_are_as_long_as_what_they_show(estimate):
    lines = estimate("--gpu", "24GB", "--gpu", "24GB", "--bits", "16").stdout.splitlines()
    bars = [line for line in lines if "of 24.00 GB" in line]
    assert len(bars) == 2
    for line in bars:
        drawn = sum(line.count(character) for character in "█▓▒░")
        gigabytes = float(line.split()[-5])
        assert drawn + line.count("·") == 48 and abs(drawn - 48 * gigabytes / 24) <= 1
    (short,) = [line for line in estimate("--gpu", "8GB", "--bits", "16").stdout.splitlines() if "of 8.00 GB" in line]
    assert "·" not in short and short.index("|") < short.rindex("█")


def test_a_terminal_without_shades_gets_letters(cli, config):
    done = cli("estimate-memory", config, "--gpu", "24GB", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "# weights  = cache and state" in done.stdout, done.stderr
    assert "nf4      ####" in done.stdout


def test_units_are_told(estimate):
    assert "24GB was read as 24 GB, 1e9 bytes each" in estimate("--gpu", "24GB").stderr
    assert "24GiB was read as 24 GiB, 2^30 bytes each" in estimate("--gpu", "24GiB").stderr
    assert "rtx4090 has 23.64 GiB" in estimate("--gpu", "rtx4090").stderr


def test_a_size_instead_of_a_model(quick_cli):
    report = found(quick_cli("estimate-memory", "--params", "7B", "--gpu", "24GB", "--json"))
    assert abs(report["model"]["parameters"] / 7e9 - 1) < 0.05
    assert any("7B" in sentence for sentence in report["assumed"])


def test_a_folder_is_counted_by_its_headers(quick_cli):
    report = found(quick_cli("estimate-memory", DEMO, "--json"))
    with safe_open(DEMO / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
    assert report["model"]["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert report["model"]["read"] == "safetensors headers"
    (half,) = (m for m in report["methods"] if m["method"] == "bfloat16")
    assert half["components"][0]["bytes"] == sum(tensor.nbytes for tensor in stored.values())


def test_a_quantized_checkpoint_is_taken_as_stored(quick_cli, tmp_path):
    qcli.quantize(str(DEMO), tmp_path / "nf4")
    (row,) = found(quick_cli("estimate-memory", tmp_path / "nf4", "--gpu", "8GB", "--json"))["methods"]
    original = qcli.estimate_memory(str(DEMO), bits=["4"]).methods[0]
    assert row["method"] == "stored" and row["verdict"] == "fits"
    assert row["components"][0]["bytes"] == pytest.approx(original.component("weights"), rel=0.01)
    refused = quick_cli("estimate-memory", tmp_path / "nf4", "--bits", "8")
    assert refused.returncode == 2 and "quantized already (bitsandbytes)" in refused.stderr
    (trained,) = found(quick_cli("estimate-memory", tmp_path / "nf4", "--train", "qlora", "--json"))["methods"]
    assert {part["name"] for part in trained["components"]} >= {"adapters and optimizer", "float32 casts"}
    assert "--train qlora" in quick_cli("estimate-memory", tmp_path / "nf4", "--train", "lora").stderr


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({}, ("--context", "200000"), "200,000 tokens is more than the 131,072"),
        ({"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}, (), "leaves in bfloat16: 90.19 GB"),
        ({"model_type": "falcon"}, (), "quantizes no layer of a falcon model"),
        ({}, ("--runtime", "vllm", "--gpu", "2xt4"), "pipeline parallelism"),
    ],
    ids=["context", "experts", "falcon", "vllm"],
)
def test_what_may_surprise_is_noted(quick_cli, tmp_path, change, options, words):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | change))
    done = quick_cli("estimate-memory", "config.json", *options)
    assert any(line.startswith("note: ") and words in line for line in done.stderr.splitlines())
    assert "note:" not in quick_cli("estimate-memory", DEMO).stderr


def test_vllm_takes_nine_tenths_of_a_gpu(estimate):
    done = estimate("--gpu", "20GB", "--runtime", "vllm", "--json")
    assert found(done)["gpus"][0]["memory"] == 18_000_000_000 and "90%" in found(done)["gpus"][0]["said"]


def test_training_needs_more(estimate):
    options = ("--context", "2048", "--gpu", "2x24GB", "--json")
    (run,) = found(estimate("--bits", "4", *options))["methods"]
    (trained,) = found(estimate("--train", "qlora", "--rank", "64", *options))["methods"]
    parts = {part["name"]: part["bytes"] for part in trained["components"]}
    assert trained["method"] == "nf4" and trained["total"]["most"] > run["total"]["most"]
    assert parts["adapters and optimizer"] == 16 * 167_772_160  # Llama-3.1-8B's at rank 64, in float32 with AdamW
    assert parts["float32 casts"] == 2 * (2 * 128256 * 4096 + 65 * 4096)  # embedding, head and norms
    assert sum(gpu["weights"] + gpu["state"] for gpu in trained["gpus"]) + trained["gpus"][0]["activations"] == sum(parts.values())
    (half,) = found(estimate("--train", "lora", *options))["methods"]
    assert half["method"] == "bfloat16" and "float32 casts" not in {part["name"] for part in half["components"]}
    for train, bits, words in (("qlora", "16", "--train lora"), ("lora", "4", "--train qlora")):
        refused = estimate("--train", train, "--bits", bits)
        assert refused.returncode == 2 and words in refused.stderr
    assert estimate("--train", "qlora", "--runtime", "vllm").returncode == 2
    assert "what would: --train qlora, " in estimate("--train", "lora", "--context", "512", "--gpu", "14GB").stdout


GLM4 = LLAMA_8B | {"model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "attention_bias": True, "pad_token_id": 0}


def test_a_model_type_without_a_family_is_built_by_transformers(quick_cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GLM4 | {"num_hidden_layers": 3}))
    report = found(quick_cli("estimate-memory", "config.json", "--json"))
    # As Llama, with biases of queries, keys and values, and four norms a layer in place of two.
    layer = 4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336
    outside = 2 * 128256 * 4096
    assert report["model"]["parameters"] == outside + 3 * (layer + 4096 + 2 * 1024 + 4 * 4096) + 4096
    assert report["model"]["read"] == "config.json alone, built by transformers"
    (said,) = (sentence for sentence in report["assumed"] if "'glm4'" in sentence)
    assert "took seconds, because qcli has no rules of its own" in said
    sizes = {row["method"]: row["components"][0]["bytes"] for row in report["methods"]}
    assert sizes["bfloat16"] == 2 * report["model"]["parameters"]
    # In int8 a byte for each weight of a linear layer but the head's, and a float32 for each row.
    rows = 4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096
    assert sizes["llm-int8"] == sizes["bfloat16"] - 3 * layer + 3 * 4 * rows


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "martian"}, "the model type 'martian'"),
        ({"hidden_size": -1}, "transformers cannot"),
        ({"num_attention_heads": "many"}, "transformers cannot read it"),
        ({"num_hidden_layers": 10**7}, "expected at most 10,000"),
        ({"num_hidden_layers": 3}, "these 3 layers has more modules than any model"),
    ],
)
def test_what_transformers_cannot_build_is_refused(quick_cli, tmp_path, monkeypatch, change, words):
    monkeypatch.setattr("qcli.memory.model.built._MOST_TENSORS", 0)
    monkeypatch.setattr("qcli.checkpoint.modules._MODULES_AT_LEAST", 20)  # so that 20 modules are the most
    (tmp_path / "config.json").write_text(json.dumps(GLM4 | change))
    done = quick_cli("estimate-memory", "config.json")
    assert done.returncode == 2 and words in done.stderr and not done.stdout


def test_the_papers_table(quick_cli):
    """Table 2 of LLM.int8(), every row."""
    rows = json.loads(quick_cli("estimate-memory", "--table", "--json").stdout)["rows"]
    cells = {row["hardware"]: (set(row["largest_8bit"]), set(row["largest_16bit"])) for row in rows}
    largest, eleven = {"OPT-175B", "BLOOM"}, {"T0-11B", "T5-11B"}
    assert cells == {
        "8x A100 80 GB": (largest, largest),
        "8x A100 40 GB": (largest, {"OPT-66B"}),
        "8x RTX 3090 24 GB": (largest, {"OPT-66B"}),
        "4x RTX 3090 24 GB": ({"OPT-66B"}, {"OPT-30B"}),
        "Colab Pro 15 GB": ({"OPT-13B"}, {"GPT-J-6B"}),
        "Colab 12 GB": (eleven, {"GPT-2 1.3B"}),
    }
    text = quick_cli("estimate-memory", "--table").stdout
    assert "Academic desktop" in text and "leave 1 GiB on each" in text and "Memory is taken as GiB" in text


def test_the_table_of_anyones_models_and_hardware(quick_cli, config):
    done = quick_cli("estimate-memory", "--table", "--models", f"{DEMO},{config}", "--gpu", "2x12GB", "--gpu", "4GB", "--json")
    both = json.loads(done.stdout)["rows"]
    assert [row["hardware"] for row in both] == ["2x12GB", "4GB"]
    assert both[0]["largest_16bit"] == [str(config)] and both[1]["largest_8bit"] == [str(DEMO)]


def test_quantizing_agrees_with_the_plan(quick_cli):
    runs = {run["method"]: run for run in found(quick_cli("estimate-memory", DEMO, "--quantizing", "--json"))["quantizing"]}
    for method in ("nf4", "llm-int8", "fp4"):
        plan = json.loads(quick_cli("quantize", DEMO, "--method", method, "--dry-run", "--json", "-o", "out").stdout)
        assert runs[method]["disk"] == sum(tensor["bytes_after"] for tensor in plan["tensors"])
        assert runs[method]["download"] == 0 and runs[method]["seconds"] > 0
    assert "qcli quantize on this machine" in quick_cli("estimate-memory", DEMO, "--quantizing").stdout


def test_a_method_that_quantize_refuses_is_named(quick_cli, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | {"hidden_size": 4160, "num_attention_heads": 65, "head_dim": 64}))
    done = quick_cli("estimate-memory", "config.json", "--bits", "rtn", "--quantizing", "--json")
    words = "qcli quantize refuses rtn for model.layers.0.self_attn.q_proj.weight: groups of 128 do not divide rows of 4160"
    assert any(words in sentence for sentence in found(done)["notes"])
    assert f"note: {words}" in done.stderr
    others = [name for name in formats.written() if name not in ("rtn", "awq")]  # both in groups of 128
    assert [run["method"] for run in found(done)["quantizing"]] == others


def test_quantizing_takes_the_memory_that_the_plan_names(tmp_path):
    from qcli.memory.costs.quantizing import quantizing
    from qcli.memory.model.opening import open_model
    from qcli.quantization.quantize import make_plan

    for run in quantizing(open_model(str(DEMO)), tmp_path):
        plan = make_plan(str(DEMO), tmp_path / "out", method=run.method)
        assert plan.working_memory <= run.memory <= plan.working_memory + (1 << 27)


def test_a_gpu_without_a_model_is_asked_what_fits_it(quick_cli):
    done = quick_cli("estimate-memory", "--gpu", "24GB")
    assert done.returncode == 0 and "24GB was read as 24 GB" in done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["bfloat16"][1].endswith("B") and "layers of width" in done.stdout
    # 8.03 billion parameters of 2 bytes, 1.07 GB of keys and values, and what the GPU itself takes.
    assert rows["Llama-3.1-8B"][1:5] == ["8.03B", "8,192", "fits", "19.71"]
    assert rows["Llama-3.3-70B"][3] == "no" and rows["OPT-6.7B"][2] == "2,048"
    assert "note: Experts are fused parameters" in done.stderr and "Mixtral-8x7B" in done.stderr


def test_scripts_are_told_what_fits(quick_cli):
    report = found(quick_cli("estimate-memory", "--gpu", "24GB", "--bits", "nf4", "--batch", "2", "--json"))
    assert set(report) == {"setting", "gpus", "fits", "notes", "largest", "models"}
    assert report["setting"] == {"context": 8192, "batch": 2, "dtype": "bfloat16", "kv_dtype": None, "runtime": "transformers"}
    (largest,) = report["largest"]
    shape = {"layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "vocab_size", "tied_embeddings"}
    assert set(largest) == {"method", "parameters", "total"} | shape and largest["total"]["most"] <= 24e9
    for model in report["models"]:
        assert set(model) == {"name", "type", "parameters", "context", "methods"}
        (method,) = model["methods"]
        assert set(method) == {"method", "verdict", "left", "total"} and method["method"] == "nf4"
        assert (method["verdict"] == "fits") == (method["total"]["most"] <= 24e9) == (method["left"] >= 0)
    nothing = quick_cli("estimate-memory", "--gpu", "500MB", "--json")
    assert nothing.returncode == 3 and found(nothing)["fits"] is False
    assert {row["parameters"] for row in found(nothing)["largest"]} == {None}


def test_the_figure(estimate, tmp_path):
    done = estimate("--gpu", "24GB", "--plot", "out.png", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG") and "wrote out.png" in done.stderr
    estimate("--gpu", "2x12GB", "--plot", "out.svg")
    drawn = (tmp_path / "out.svg").read_text()
    for words in ("bfloat16 GPU 1", "weights", "overhead", "8,192 tokens"):
        assert words in drawn
    assert estimate("--plot", "out.jpg").returncode == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "For example: qcli estimate-memory --params 8B --gpu 24GB"),
        (("--bits", "4"), "neither a model nor a GPU was given"),
        (("--gpu", "24GB", "--plot", "x.png"), "--plot was given without a model"),
        (("--gpu", "24GB", "--train", "qlora"), "--train was given without a model"),
        (("--gpu", "24GB", "--bits", "3"), "--bits is '3'"),
        (("--gpu", "24GB", "--kv-dtype", "int3"), "int3"),
        (("--gpu", "24GB", "--context", "0"), "--context is 0"),
        (("--gpu", "x"), "--gpu is 'x'"),
        (("--params", "7B", "x"), "both given"),
        (("--params", "none"), "7B"),
        (("./nowhere",), "there is no folder ./nowhere"),
        (("bad.json",), "is not valid JSON"),
        (("",), "the name of the model is empty"),
        (("list.json",), "expected a JSON object"),
        (("empty.json",), "model_type"),
        (("partial.json",), "hidden_size"),
        (("unknown.json",), "'martian'"),
        (("null.json",), "num_hidden_layers"),
        (("scheme.json",), 'quantization_config is "int4"'),
        (("llama-8b.json", "--bits", "3"), "--bits is '3'"),
        (("llama-8b.json", "--context", "0"), "--context is 0"),
        (("llama-8b.json", "--batch", "-1"), "--batch is -1"),
        (("llama-8b.json", "--runtime", "x"), "--runtime is 'x'"),
        (("llama-8b.json", "--train", "x"), "--train is 'x'"),
        (("llama-8b.json", "--kv-dtype", "int3"), "int3"),
        (("llama-8b.json", "--models", "a"), "without --table"),
        (("--table", "llama-8b.json"), "--table was given with a model"),
        (("--table", "--gpu", "x"), "--gpu is 'x'"),
        (("--table", "--plot", "x.png"), "--plot was given with --table"),
        (("--table", "--bits", "4"), "--bits was given with --table"),
        (("llama-8b.json", "--revision", "main"), "no revision"),
        (("empty",), "has no config.json"),
    ],
)
def test_what_is_refused(quick_cli, config, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    files = {
        "bad.json": "{",
        "list.json": "[1]",
        "empty.json": "{}",
        "unknown.json": json.dumps(LLAMA_8B | {"model_type": "martian"}),
        "partial.json": json.dumps({k: v for k, v in LLAMA_8B.items() if k != "hidden_size"}),
        "scheme.json": json.dumps(LLAMA_8B | {"quantization_config": "int4"}),
        "null.json": json.dumps(LLAMA_8B | {"num_hidden_layers": None}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    done = quick_cli("estimate-memory", *arguments)
    assert done.returncode in (1, 2) and words in done.stderr and not done.stdout


def test_hubs_without_ranges_and_without_connection(quick_cli, tmp_path, monkeypatch):
    with running_hub() as hub:
        hub.add_repo("org/demo", DEMO)
        hub.without_ranges.add("org/demo")
        hub.serve_this_process(monkeypatch, tmp_path / "home")
        done = quick_cli("estimate-memory", "org/demo")
        assert done.returncode == 0 and "1,369,728 parameters (safetensors headers)" in done.stdout, done.stderr
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        hub.serve_this_process(monkeypatch, tmp_path / "empty")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        done = quick_cli("estimate-memory", "org/demo")
        assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr and not done.stdout


def test_no_weight_of_a_hub_model_is_downloaded(quick_cli, tmp_path, monkeypatch):
    import shutil

    bins = tmp_path / "bins"
    bins.mkdir()
    shutil.copy(DEMO / "config.json", bins)
    (bins / "pytorch_model.bin").write_bytes(b"0" * 1000)
    (bins / "original").mkdir()
    shutil.copy(DEMO / "model.safetensors", bins / "original")
    with running_hub() as hub:
        hub.add_repo("org/demo", DEMO)
        hub.add_repo("org/bins", bins)
        hub.add_repo("org/gated", DEMO, gated=True)
        hub.serve_this_process(monkeypatch, tmp_path / "home")
        done = quick_cli("estimate-memory", "org/demo", "--gpu", "24GB")
        assert done.returncode == 0 and "1,369,728 parameters (safetensors headers)" in done.stdout, done.stderr
        assert 0 < hub.sent("model.safetensors") <= 100_000
        assert not list((tmp_path / "home").rglob("*.safetensors"))
        done = quick_cli("estimate-memory", "org/bins")
        assert done.returncode == 0 and "1,369,728 parameters (config.json alone" in done.stdout, done.stderr
        assert hub.sent("pytorch_model.bin") == 0
        hub.requests.clear()
        monkeypatch.setenv("HF_TOKEN", "")
        assert "gated" in quick_cli("estimate-memory", "org/gated").stderr
        assert len(hub.requests) == 2  # the listing and config.json: a refusal is no lost connection, to be tried again


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("head", [8, 4])
def test_a_quantized_head_takes_what_is_loaded(name, head, quick_cli, tmp_path):
    """As an estimate of the unquantized model, and of the checkpoint that is made of it."""
    make = make_tied if name.endswith("-tied") else make_model
    make(name.removesuffix("-tied"), tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=4, head=head)
    loaded, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    held = {id(t): t.nbytes for t in (*loaded.parameters(), *loaded.buffers()) if t.dtype != torch.float32 or t.dim() == 1}
    offsets = 4 * sum(isinstance(m, Linear4bit) for m in loaded.modules())
    tables = 1088 * sum(isinstance(m, Linear4bit) for m in loaded.modules())
    before = found(quick_cli("estimate-memory", "model", "--bits", "4", "--head", str(head), "--json"))["methods"][0]
    after = found(quick_cli("estimate-memory", "out", "--json"))["methods"][0]
    sizes = [next(part["bytes"] for part in row["components"] if part["name"] == "weights") for row in (before, after)]
    assert abs(sizes[0] - sizes[1]) <= offsets  # the offset stands in the quant_state on disk
    assert sizes[0] == pytest.approx(sum(held.values()) + offsets + tables, rel=0.02)
