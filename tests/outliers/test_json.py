"""The JSON of `qcli inspect-outliers`: its keys are a promise to those who read it by programs."""

import json

import torch
from safetensors.torch import load_file, save_file

from qcli.outliers.inspect_outliers import inspect_outliers
from qcli.outliers.weights.inspect import inspect_weights
from qcli.schemes import NAMED
from tests.conftest import ROOT
from tests.outliers.planted import save, small_llama, write_text

DEMO = ROOT / "examples/demo-model"
ACTIVATIONS = (
    "channels rows absmax rms crest kurtosis channel_ratio token_ratio token_absmax outlier_columns outlier_share dims".split()
)
DIM = "dim count share min max mean std absmax kurtosis quartiles one_sided"
KEYS = {
    "": "format version qcli model text threshold min_layers min_positions layers features table4 massive_activations "
    "super_weights attention bos ablation charts notes recommendation",
    "model": "name architecture layers hidden_size parameters quantization dtype",
    "text": "name documents sequences sequence_length tokens bos_tokens bos",
    "layers": "layer name sites residual",
    "layers.sites": " ".join(["kind", "modules", *ACTIVATIONS, "columns_kept", "sqnr"]),
    "layers.sites.token_absmax": "median p99 max",
    "layers.sites.dims": DIM,
    "layers.sites.sqnr": "int8-per-tensor int8-row-wise int8 llm-int8 nf4",
    "layers.sites.sqnr.nf4": "output ordinary",
    "layers.residual": " ".join([*ACTIVATIONS, "median", "massive"]),
    "layers.residual.token_absmax": "median p99 max",
    "layers.residual.dims": DIM,
    "features": "dim layers_share positions_share positions_union absmax quartiles one_sided outlier",
    "table4": "outliers one_sided layers_share positions_share positions_union quartiles top1_with top1_without perplexity stage "
    "papers_rows",
    "table4.papers_rows": "model parameters perplexity outliers one_sided layers_share positions_share quartiles top1_with "
    "top1_without",
    "massive_activations": "layer position token dim value median sequences",
    "super_weights": "layer module row column weight input output",
    "attention": "sink_share top1 layers",
    "attention.layers": "layer top1_with top1_without top1_random",
    "bos": "positions absmax outlier_dims",
    "ablation": "dims random_dims top1 perplexity",
    "ablation.top1": "with without random",
    "ablation.perplexity": "whole without random tokens",
    "charts": "heatmap surface histograms",
    "charts.heatmap": "kind layers dims absmax share",
    "charts.surface": "layer kind tokens dims values",
    "charts.histograms": "dim layer kind edges counts quartiles",
    "recommendation": "method threshold skip command alternative why",
}
WEIGHT_KEYS = {
    "": "format version qcli model modules_decided_by linears kinds norms norm_dims super_weights sizes notes",
    "model": "name architecture layers hidden_size parameters quantization dtype",
    "linears": "layer module tensor kind out_features in_features dtype quantized nonfinite absmax rms crest kurtosis row_spread "
    "row_crest block_spread columns largest sqnr",
    "linears.columns": "beyond max_z dims",
    "linears.columns.dims": "dim z",
    "linears.largest": "row column weight times_rms times_next",
    "linears.sqnr": "llm-int8 nf4",
    "kinds": "kind weights parameters quantized absmax median_crest median_kurtosis worst_row_spread worst_block_spread "
    "worst_kurtosis sqnr column_dims",
    "kinds.sqnr": "llm-int8 nf4",
    "kinds.column_dims": "dim share",
    "norms": "layer module tensor kind channels dtype nonfinite mean std beyond max_z dims",
    "norms.dims": "dim z",
    "norm_dims": "channels dim norms of share max_z candidate",
    "super_weights": "layer module row column weight times_rms times_next",
    "sizes": "method bytes bits_per_weight",
}


def keys(value, path="", found=None) -> dict[str, set[str]]:
    """The keys of every object in a JSON value, by the path that leads there."""
    found = {} if found is None else found
    if isinstance(value, dict):
        found.setdefault(path, set()).update(value)
        for key, part in value.items():
            keys(part, f"{path}.{key}".lstrip("."), found)
    elif isinstance(value, list):
        for part in value:
            keys(part, path, found)
    return found


def assert_keys(reports, expected):
    found = {}
    for report in reports:
        json.dumps(report, allow_nan=False)
        keys(report, found=found)
    for path, names in expected.items():
        assert found.get(path) == set(names.split()), path
    sqnr = {f"{path}.{name}" for path in expected if path.endswith("sqnr") for name in expected[path].split()}
    assert set(found) - sqnr <= set(expected)


def test_keys_of_a_run(tmp_path):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[9, 17] = 3000.0
    save(model, tmp_path)
    write_text(tmp_path / "text.txt", 64)
    demo = inspect_outliers(str(DEMO), text=ROOT / "examples/stories.jsonl", tokens=400, ablate=True, device="cpu")
    spikes = inspect_outliers(str(tmp_path), text=tmp_path / "text.txt", sequence_length=32, device="cpu")
    assert spikes.super_weights and spikes.massive_activations and demo.bos
    assert_keys([demo.summary(), spikes.summary()], KEYS)
    assert demo.summary()["format"] == "qcli-outliers" and demo.summary()["version"] == 1
    assert set(KEYS["layers.sites.sqnr"].split()) <= set(NAMED)


def test_keys_of_weights(tmp_path):
    (tmp_path / "config.json").write_text((DEMO / "config.json").read_text())
    tensors = load_file(DEMO / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][5, 100] = 40.0
    tensors["model.layers.2.self_attn.q_proj.weight"][:, 9] *= 30
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = inspect_weights(str(tmp_path)).summary()
    assert_keys([found], WEIGHT_KEYS)
    assert found["format"] == "qcli-weights" and found["version"] == 1
    assert [size["method"] for size in found["sizes"]] == ["as stored", "llm-int8", "nf4-plain", "nf4"]
