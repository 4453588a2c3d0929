"""The instrument on models that are put together in other ways than a Llama, and on rare turns of one."""

import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import transformers

from qcli.commands import _outlier_tables
from qcli.outliers.inspect_outliers import inspect_outliers
from qcli.outliers.statistics import ChannelStats, OutlierSketch, quartiles
from tests.conftest import ROOT
from tests.hub_server import running_hub
from tests.outliers.planted import LAYERS, plant, save, small_llama, write_text

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}


def inspection(model, path, characters=200, **options):
    save(model, path)
    write_text(path / "text.txt", characters)
    return inspect_outliers(str(path), text=path / "text.txt", sequence_length=32, device="cpu", **options)


def inspect(*arguments, **options):
    return inspection(*arguments, **options).summary()


def test_an_input_met_again_after_another_is_the_same_site(tmp_path):
    """Multi-head latent attention reads the hidden state, then a projection of it, then the hidden state again."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **_TEXT,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=2,
    )
    report = inspect(transformers.DeepseekV3ForCausalLM(config), tmp_path)
    sites = {site["kind"]: site["modules"] for site in report["layers"][0]["sites"] if site["kind"] != "other"}
    assert sites["attention input"] == ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"]
    assert sites["attention output"] == ["self_attn.o_proj"]
    assert all(site["rows"] == 200 for site in report["layers"][0]["sites"])


def test_layers_are_those_that_text_passes(tmp_path):
    """Those of a vision tower are none."""
    vision = {"depth": 3, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14, "mlp_ratio": 2}
    text = _TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    done = []

    @contextmanager
    def progress(total, already):
        done.append([total, already])
        yield SimpleNamespace(advance=lambda count, name: done.append(count))

    report = inspect(transformers.Qwen2VLForConditionalGeneration(config), tmp_path, progress=progress)
    (total, _), *counts = done
    assert total - 7 < sum(counts) <= total  # the head's bytes are shared out over 7 windows
    assert report["model"]["layers"] == len(report["layers"]) == 2


def test_more_outliers_at_a_site_than_have_histograms(tmp_path):
    """The commonest dimension of the model is at its height where two dozen others are more common still."""
    crowd = {dim: 1000.0 for dim in range(24)}
    model = plant(plant(small_llama(), {50: 20.0}), crowd | {50: 2.0}, layers=[0])
    report = inspect(model, tmp_path)
    first = report["layers"][0]["sites"][0]
    assert first["outlier_columns"] > 24 and 50 not in [d["dim"] for d in first["dims"]]
    assert report["features"][0]["dim"] == 50
    [histogram] = [h for h in report["charts"]["histograms"] if h["dim"] == 50]
    assert sum(histogram["counts"]) == 200


def test_padding_makes_no_super_weight(tmp_path):
    """A window is padded with a token that would set one off."""
    model = small_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 0
        model.model.embed_tokens.weight[0, 3] = 100.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        mlp = model.model.layers[1].mlp
        mlp.gate_proj.weight[17] = mlp.up_proj.weight[17] = 0
        mlp.gate_proj.weight[17, 3] = mlp.up_proj.weight[17, 3] = 10.0
        mlp.down_proj.weight[9, 17] = 10_000.0
        model.model.embed_tokens.weight[1:, 3] = -0.001  # the gate of all others is shut
    report = inspect(model, tmp_path, characters=40)
    assert report["text"]["sequences"] == 2
    assert report["super_weights"] == [] and report["massive_activations"] == []


def test_every_super_weight_of_a_projection_is_found(tmp_path):
    """One input spike, and two rows that turn it into spikes of the output."""
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[9, 17] = 3000.0
        model.model.layers[1].mlp.down_proj.weight[30, 17] = -2500.0
    found = inspect(model, tmp_path, characters=64)["super_weights"]
    assert {(w["layer"], w["row"], w["column"], w["weight"]) for w in found} == {(1, 9, 17, 3000.0), (1, 30, 17, -2500.0)}


def test_a_threshold_that_16_bits_do_not_hold():
    """bfloat16 rounds 6.1 to 6.09375, which is below it."""
    sketch = OutlierSketch(6.1)
    sketch.add(torch.tensor([[6.09375], [-6.125], [6.1875]], dtype=torch.bfloat16))
    values, counts = sketch.of(0)
    assert counts.tolist() == [1, 1]
    assert values.tolist() == pytest.approx([-6.125, 6.1875], rel=0.005)
    assert quartiles(values, counts)[0] < 0


@pytest.mark.parametrize("mean", [1.0, 100.0, 300.0, 3000.0, 100_000.0])
def test_kurtosis_far_from_zero_is_right_or_none(mean):
    """Float64 power sums do not hold it where values hardly vary."""
    x = mean + torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    stats = ChannelStats(1)
    for part in x.split(300):
        stats.add(part, 6.0)
    centred = x.double() - x.double().mean()
    exact = (centred.pow(4).mean() / centred.square().mean() ** 2).item()
    found = stats.channel_moments().kurtosis.item()
    assert math.isnan(found) if mean > 1000 else found == pytest.approx(exact, rel=1e-4)


def test_a_perplexity_beyond_all_numbers_is_none(tmp_path):
    model = small_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    model = plant(model, {5: 40.0})
    found = inspection(model, tmp_path, characters=64, ablate=True)
    report = found.summary()
    assert report["table4"]["perplexity"] is None
    assert set(report["ablation"]["perplexity"]) == {"whole", "without", "random", "tokens"}
    assert report["ablation"]["perplexity"]["whole"] is None
    json.dumps(report, allow_nan=False)
    _outlier_tables.show(found)


def test_a_hub_model_and_the_command_that_opens_the_same(tmp_path):
    """In a process of its own, for huggingface_hub reads its address once."""
    save(small_llama(), tmp_path)
    write_text(tmp_path / "text.txt")
    command = ["inspect-outliers", "org/tiny", "--revision", "main", "--trust-remote-code", "--json"]
    with running_hub() as hub:
        hub.add_repo("org/tiny", tmp_path)
        done = subprocess.run(
            [sys.executable, "-m", "qcli", *command, "--sequence-length", "32", "--text", tmp_path / "text.txt"],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | hub.environment(tmp_path / "home"),
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["model"]["name"] == "org/tiny" and len(report["layers"]) == LAYERS
    for command in (report["recommendation"]["command"], report["recommendation"]["alternative"]):
        assert command.startswith("qcli quantize org/tiny ")
        assert command.endswith(" --revision main --trust-remote-code")
