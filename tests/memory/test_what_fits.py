"""What fits given GPUs: the well-known models against published counts, the largest model against the full estimate."""

import json
from dataclasses import replace

import pytest

from qcli.memory.components import Costs, Setting
from qcli.memory.estimate import estimate_memory
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.like_llama import from_size
from qcli.memory.model.opening import Model
from qcli.memory.model.parameters import parameters
from qcli.memory.placing import verdict
from qcli.memory.placing.hardware import gpus
from qcli.memory.what_fits import deepened, known_models, what_fits

PUBLISHED = {  # parameters, as the hub counts those of the safetensors files; of tied embeddings one
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-1.7B": 1_711_376_384,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.3-70B": 70_553_706_496,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mixtral-8x7B": 46_702_792_704,
    "Gemma-2-9B": 9_241_705_984,
    "Gemma-3-4B": 4_300_079_472,
    "Gemma-3-12B": 12_187_325_040,
    "Gemma-3-27B": 27_432_406_640,
    "Phi-3-mini-4k": 3_821_079_552,
    "Phi-4": 14_659_507_200,
    "OPT-6.7B": 6_658_473_984,
    "DeepSeek-V3": 671_026_419_200 - 58 * 256,  # without the routers' correction biases, which are buffers
}


def test_the_known_models_have_the_published_counts():
    assert {model.label: model.parameter_count for model in known_models()} == PUBLISHED


def test_nothing_of_a_known_model_is_assumed():
    for runtime in ("transformers", "vllm"):
        what_fits(["24GB"], runtime=runtime)
    assert {model.label: model.config.assumed for model in known_models()} == dict.fromkeys(PUBLISHED, [])


def deeper(row) -> Model:
    config = row.model.config
    config = ModelConfig(config.raw | {"num_hidden_layers": config.layers + 1}, config.label)
    return Model(config.label, config, parameters(config), "")


@pytest.mark.parametrize("gpu", [["24GB"], ["2x12GB"], ["16GiB", "6GB"]])
def test_the_largest_fits_and_with_a_layer_more_it_does_not(gpu):
    found = what_fits(gpu)
    assert [row.method for row in found.largest] == ["bfloat16", "llm-int8", "nf4"]
    for row in found.largest:
        assert verdict.fits(row.needs, found.gpus)
        assert not verdict.fits(Costs(deeper(row), row.method, "bfloat16").needs(found.setting, found.gpus), found.gpus)
    half, eight, four = (row.model.parameter_count for row in found.largest)
    assert 1.5 * half < eight < 2 * half and 1.5 * eight < four < 2 * eight


@pytest.mark.parametrize("method", ["bfloat16", "llm-int8", "nf4"])
@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
def test_alike_layers_cost_what_they_cost_one_by_one(method, runtime):
    config = from_size("3B")
    one = ModelConfig(config.raw | {"num_hidden_layers": 1}, "one layer")
    shallow = Costs(Model("", one, parameters(one), ""), method, "bfloat16")
    full = Costs(Model("", config, parameters(config), ""), method, "bfloat16")
    setting = Setting(8192, 2, "bfloat16", None, runtime, None, 0)
    assert config.layers > 20 and deepened(shallow, config).needs(setting, gpus(["24GB"])) == full.needs(setting, gpus(["24GB"]))


@pytest.fixture(scope="module")
def two_small():
    return what_fits(["12GB", "12GB"], kv_dtype="fp8")


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Gemma-3-12B", "Mixtral-8x7B", "Phi-3-mini-4k", "OPT-6.7B"])
def test_a_known_model_has_the_verdicts_of_its_own_estimate(two_small, name, tmp_path):
    (row,) = (row for row in two_small.known if row.model.label == name)
    (tmp_path / "config.json").write_text(json.dumps(row.model.config.raw))
    config = str(tmp_path / "config.json")
    bits = ["bfloat16", "8", "4"]
    alone = estimate_memory(config, gpu=["2x12GB"], bits=bits, context=row.context, kv_dtype="fp8")
    assert row.context == min(8192, row.model.config.max_context)
    for mine, theirs in zip(row.verdicts, alone.methods, strict=True):
        assert (mine.method, mine.verdict) == (theirs.method, theirs.placement.verdict)
        assert mine.needs == theirs.needs


def test_more_tokens_leave_less_room():
    short, long = what_fits(["24GB"], bits=["16"]), what_fits(["24GB"], bits=["16"], context=65536)
    assert long.largest[0].model.parameter_count < short.largest[0].model.parameter_count
    assert [row.context for row in long.known if row.model.label == "Mistral-7B-v0.3"] == [32768]
    assert replace(short.setting, context=65536) == long.setting


def test_a_model_that_quantize_would_refuse_is_named():
    refused = [sentence for sentence in what_fits(["24GB"], bits=["rtn"]).notes if "qcli quantize refuses rtn" in sentence]
    (small,) = (sentence for sentence in refused if sentence.startswith("SmolLM2-135M: "))
    assert "groups of 128 do not divide rows of 576" in small
    assert {sentence.partition(":")[0] for sentence in refused} == {"SmolLM2-135M", "Gemma-3-4B", "Gemma-3-12B", "Gemma-3-27B"}


def test_where_nothing_fits_it_is_said():
    found = what_fits(["500MB"])
    assert not found.fits and [row.model for row in found.largest] == [None] * 3
    assert {each.verdict for row in found.known for each in row.verdicts} == {"does not fit"}
