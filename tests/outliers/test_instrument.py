"""The instrument against planted outlier features, against float64 statistics of stored activations, and against itself."""

import json
import math

import numpy as np
import pytest
import torch
import transformers

import qcli
from qcli.errors import NonFiniteError, UsageError
from qcli.outliers.inspect_outliers import inspect_outliers
from qcli.outliers.passes import check_room
from qcli.streaming import batches
from qcli.streaming.corpus import read_windows
from qcli.streaming.reading import weight_bytes
from qcli.streaming.skeleton import Skeleton
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model
from tests.outliers.planted import HIDDEN, LAYERS, plant, recorded_inputs, save, small_llama, write_text

GAINS = {5: 40.0, 23: 20.0, 60: 30.0}
LENGTH = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """(model with planted features, the one before, folder)."""
    path = tmp_path_factory.mktemp("planted")
    before = small_llama()
    model = plant(before, GAINS)
    save(model, path)
    write_text(path / "text.txt")
    return model, before, path


def inspect(path, **options):
    return inspect_outliers(str(path), text=path / "text.txt", sequence_length=LENGTH, device="cpu", **options).summary()


@pytest.fixture(scope="module")
def report(folder):
    return inspect(folder[2])


@pytest.fixture(scope="module")
def windows(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder[2])
    return [w.ids for w in read_windows(tokenizer, folder[2] / "text.txt", sequence_length=LENGTH).windows]


@pytest.fixture(scope="module")
def activations(folder, windows):
    """Of the whole model: name of the linear layer -> float64 [tokens, channels]."""
    return recorded_inputs(folder[0], windows)


def sites(report):
    return {(layer["layer"], site["kind"]): site for layer in report["layers"] for site in layer["sites"]}


def test_planting_changes_no_logit(folder, windows):
    model, before, _ = folder
    ids = torch.tensor([windows[0]])
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=0, atol=1e-5)


def test_exactly_the_planted_dimensions_are_outlier_features(report):
    found = {f["dim"] for f in report["features"] if f["outlier"]}
    assert found == set(GAINS)
    assert report["table4"]["outliers"] == len(GAINS)


def test_shares_and_magnitudes_are_those_of_the_stored_activations(report, activations):
    states = [a for name, a in activations.items() if name.endswith(("q_proj", "gate_proj"))]
    assert len(states) == 2 * LAYERS
    layers = [torch.stack(states[i : i + 2]) for i in range(0, len(states), 2)]
    for feature in report["features"]:
        dim = feature["dim"]
        hits = torch.stack([a[:, dim].abs() >= 6 for a in states])
        assert feature["positions_share"] == hits.double().mean().item()
        assert feature["positions_union"] == hits.any(0).double().mean().item()
        assert feature["layers_share"] == np.mean([(a[..., dim].abs() >= 6).any().item() for a in layers])
        assert feature["absmax"] == pytest.approx(max(a[:, dim].abs().max().item() for a in states), rel=1e-5)
        outliers = np.concatenate([a[:, dim][a[:, dim].abs() >= 6].numpy() for a in states])
        exact = np.quantile(outliers, (0.25, 0.5, 0.75), method="lower")
        np.testing.assert_allclose(feature["quartiles"], exact, rtol=0.005 + 1e-6)
        minority = min((outliers > 0).mean(), (outliers < 0).mean())
        assert feature["one_sided"] == (minority <= 0.01)


def test_statistics_equal_float64_ones(report, activations):
    kinds = {"attention input": "q_proj", "attention output": "o_proj", "ffn input": "gate_proj", "ffn output": "down_proj"}
    found = sites(report)
    assert len(found) == 4 * LAYERS
    for (layer, kind), site in found.items():
        name = next(n for n in activations if n.startswith(f"model.layers.{layer}.") and n.endswith(kinds[kind]))
        x = activations[name]
        assert site["rows"] == len(x) and site["channels"] == x.shape[1]
        centred = x - x.mean()
        expected = {
            "absmax": x.abs().max(),
            "rms": x.square().mean().sqrt(),
            "crest": x.abs().max() / x.square().mean().sqrt(),
            "kurtosis": centred.pow(4).mean() / centred.square().mean() ** 2,
            "channel_ratio": x.abs().amax(0).max() / x.abs().amax(0).median(),
            "token_ratio": x.abs().amax(1).max() / x.abs().amax(1).median(),
            "outlier_share": (x.abs() >= 6).double().mean(),
        }
        for field, value in expected.items():
            assert site[field] == pytest.approx(value.item(), rel=1e-5), (layer, kind, field)
        assert site["outlier_columns"] == int((x.abs() >= 6).any(0).sum())
        for dim in site["dims"]:
            column = x[:, dim["dim"]]
            assert dim["count"] == int((column.abs() >= 6).sum())
            assert dim["min"] == pytest.approx(column.min().item(), rel=1e-5)
            assert dim["max"] == pytest.approx(column.max().item(), rel=1e-5)
            assert dim["mean"] == pytest.approx(column.mean().item(), rel=1e-5, abs=1e-6)
            assert dim["std"] == pytest.approx(column.std(correction=0).item(), rel=1e-5)


def test_the_residual_stream_is_that_of_the_whole_model(folder, report, windows):
    """transformers' own hidden states: the output of each block."""
    with torch.inference_mode():
        states = [folder[0](torch.tensor([list(w)]), output_hidden_states=True).hidden_states for w in windows]
    for layer in range(LAYERS - 1):  # the last of them has passed the final norm
        x = torch.cat([s[layer + 1][0].double() for s in states])
        found = report["layers"][layer]["residual"]
        centred = x - x.mean()
        assert found["rows"] == len(x)
        assert found["absmax"] == pytest.approx(x.abs().max().item(), rel=1e-5)
        assert found["kurtosis"] == pytest.approx((centred.pow(4).mean() / centred.square().mean() ** 2).item(), rel=1e-4)
        assert found["outlier_columns"] == int((x.abs() >= 6).any(0).sum())
        tokens = np.sort(x.abs().amax(1).numpy())
        expected = np.quantile(tokens, (0.5, 0.99, 1.0), method="lower")
        np.testing.assert_allclose(list(found["token_absmax"].values()), expected, rtol=1e-5)


def test_hidden_states_without_room_are_refused(folder, monkeypatch):
    monkeypatch.setattr("qcli.outliers.passes.available_memory", lambda: 400_000)
    words = r"hidden states of 1,000 tokens take 512 kB, the largest block \d+ kB, and 400 kB of memory are free"
    with pytest.raises(UsageError, match=words) as refused:
        inspect(folder[2])
    fewer = int(refused.value.hint.removeprefix("Read fewer: --tokens ").removesuffix("."))
    assert inspect(folder[2], tokens=fewer)["text"]["tokens"] == fewer
    monkeypatch.setattr("qcli.outliers.passes.available_memory", lambda: 1000)
    with pytest.raises(UsageError) as refused:
        inspect(folder[2])
    assert refused.value.hint == "No choice of --tokens would do; free some memory."


def test_workers_share_the_memory_of_a_machine(folder, monkeypatch):
    """A half of the text in the memory that one machine has for two halves."""
    skeleton = Skeleton(str(folder[2]), device="cpu")
    corpus = read_windows(skeleton.tokenizer, folder[2] / "text.txt", sequence_length=LENGTH)
    half, block = corpus.windows[:16], max(map(weight_bytes, skeleton.units))  # 512 tokens take 262,144 bytes
    monkeypatch.setattr("qcli.outliers.passes.available_memory", lambda: 2 * (block + 262_144))
    check_room(skeleton, half, 1, corpus.windows, workers=2)
    monkeypatch.setattr("qcli.outliers.passes.available_memory", lambda: 2 * (block + 262_143))
    check_room(skeleton, half, 1, corpus.windows, workers=1)
    with pytest.raises(UsageError, match="of 512 tokens take 262 kB, .* of memory are free for each of 2 workers") as refused:
        check_room(skeleton, half, 1, corpus.windows, workers=2)
    assert refused.value.hint == "Read fewer: --tokens 499."


def test_histograms_count_every_position(report, activations):
    for histogram in report["charts"]["histograms"]:
        layer, dim = histogram["layer"], histogram["dim"]
        name = {"attention input": "q_proj", "ffn input": "gate_proj"}[histogram["kind"]]
        x = next(a for n, a in activations.items() if n.startswith(f"model.layers.{layer}.") and n.endswith(name))
        counts, _ = np.histogram(x[:, dim].numpy(), histogram["edges"])
        assert sum(histogram["counts"]) == len(x)
        assert np.abs(counts - histogram["counts"]).sum() <= 0.01 * len(x)  # edges are rounded for the page


def sqnr(y, rounded):
    y, rounded = y.detach(), rounded.detach()
    return 10 * math.log10(y.square().sum() / (y - rounded).square().sum())


def int8(x, absmax):
    return (x / absmax * 127).round() * absmax / 127


def test_sqnr_is_that_of_a_float64_simulation(folder, report, activations):
    """Vector-wise and per-tensor int8, and LLM.int8(), of one site, over the sequences that were sampled."""
    model = folder[0]
    site = sites(report)[1, "ffn input"]
    x = activations["model.layers.1.mlp.gate_proj"]
    sequences = x.split(LENGTH)[:16]  # 512 tokens
    total = {name: [[], [], [], []] for name in ("int8-per-tensor", "int8", "llm-int8")}
    for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
        w = linear.weight.double()
        rows = int8(w, w.abs().amax(1, keepdim=True))
        for s in sequences:
            outlier = (s.abs() >= 6).any(0)
            kept = torch.where(s.abs() >= 6, 0, s)
            decomposed = torch.where(outlier, s, int8(kept, kept.abs().amax(1, keepdim=True)))
            forms = {
                "int8-per-tensor": (int8(s, s.abs().max()), int8(w, w.abs().max())),
                "int8": (int8(s, s.abs().amax(1, keepdim=True)), rows),
                "llm-int8": (decomposed, rows),
            }
            for name, (a, b) in forms.items():
                ordinary = s[:, ~outlier] @ w[:, ~outlier].t(), a[:, ~outlier] @ b[:, ~outlier].t()
                for into, value in zip(total[name], (s @ w.t(), a @ b.t(), *ordinary)):
                    into.append(value)
    for name, parts in total.items():
        y, y_, ordinary, ordinary_ = (torch.cat(part) for part in parts)
        assert site["sqnr"][name]["output"] == pytest.approx(sqnr(y, y_), abs=0.01)
        assert site["sqnr"][name]["ordinary"] == pytest.approx(sqnr(ordinary, ordinary_), abs=0.01)


def test_the_global_figure_hides_what_the_ordinary_one_shows(report):
    found = sites(report)[0, "attention input"]["sqnr"]
    assert found["llm-int8"]["ordinary"] - found["int8"]["ordinary"] > 6


def close(a, b, path=""):
    """The same report, to the rounding of float32 activations."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            close(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            close(x, y, f"{path}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=2e-4, abs=1e-5), path
    else:
        assert a == b, path


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
def test_results_do_not_depend_on_batches(folder, report, monkeypatch, batch_tokens):
    monkeypatch.setattr(batches.make_batches, "__defaults__", (batch_tokens,))
    monkeypatch.setattr("qcli.streaming.reading.BATCH_TOKENS", batch_tokens)
    close(report, inspect(folder[2]))


def test_perplexity_is_that_of_an_independent_loop(folder, report, windows):
    losses = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor([list(window)])
            logits = folder[0](ids).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert report["table4"]["perplexity"] == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-6)


def test_ablation_equals_one_by_hooks_on_the_whole_model():
    """On the bundled model: outlier features against random dimensions, with transformers' own forward pass."""
    demo, text = ROOT / "examples/demo-model", ROOT / "examples/stories.jsonl"
    report = inspect_outliers(str(demo), text=text, tokens=400, ablate=True, dtype="float32", device="cpu").summary()
    found = report["ablation"]
    assert found["dims"] == [7, 21, 38, 52] and not set(found["dims"]) & set(found["random_dims"])
    assert found["perplexity"]["without"] > 3 * found["perplexity"]["whole"]
    assert found["perplexity"]["random"] < 1.1 * found["perplexity"]["whole"]
    assert found["top1"]["with"] - found["top1"]["without"] > 2 * abs(found["top1"]["with"] - found["top1"]["random"])

    model = transformers.LlamaForCausalLM.from_pretrained(demo, dtype=torch.float32, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    texts = read_windows(tokenizer, text, tokens=400).windows
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")

    def perplexity(dims, only=None):
        handles = [
            m.register_forward_pre_hook(lambda m, a: (a[0].index_fill(-1, torch.tensor(dims), 0),))
            for n, m in model.named_modules()
            if dims and n.endswith(names) and (only is None or f".{only}.self_attn" in n)
        ]
        losses, top1 = [], []
        with torch.inference_mode():
            for window in texts:
                ids = torch.tensor([window.ids])
                output = model(ids, output_attentions=True)
                losses.append(torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:], reduction="none"))
                top1.append([a[0, :, 1:].amax(-1).flatten() for a in output.attentions])
        for handle in handles:
            handle.remove()
        return torch.cat(losses).mean().exp().item(), [torch.cat(layer).mean().item() for layer in zip(*top1)]

    for variant, dims in (("whole", []), ("without", found["dims"]), ("random", found["random_dims"])):
        assert found["perplexity"][variant] == pytest.approx(perplexity(dims)[0], rel=1e-4)
    regular = perplexity([])[1]
    for layer in report["attention"]["layers"]:
        index = layer["layer"]
        assert layer["top1_with"] == pytest.approx(regular[index], rel=1e-4)
        assert layer["top1_without"] == pytest.approx(perplexity(found["dims"], index)[1][index], rel=1e-4)


def test_a_massive_activation_and_its_super_weight_are_found(tmp_path):
    """A weight of layer 1's down projection that turns one channel of one token into a value beyond all others."""
    model = small_llama()
    with torch.no_grad():
        mlp = model.model.layers[1].mlp
        mlp.down_proj.weight[9, 17] = 3000.0
        model.model.layers[2].mlp.down_proj.weight.zero_()
    save(model, tmp_path)
    write_text(tmp_path / "text.txt", 64)
    report = inspect(tmp_path)
    assert [(w["layer"], w["module"], w["row"], w["column"]) for w in report["super_weights"]] == [(1, "mlp.down_proj", 9, 17)]
    assert report["super_weights"][0]["weight"] == 3000.0
    massive = [m for m in report["massive_activations"] if m["layer"] == 1]
    assert massive and {m["dim"] for m in massive} == {9}
    assert all(abs(m["value"]) > 100 and abs(m["value"]) >= 1000 * m["median"] for m in massive)
    assert "model.layers.1.mlp.down_proj" in report["recommendation"]["skip"]
    assert not any(f["outlier"] for f in report["features"] if f["dim"] != 9)


def test_bos_is_apart(tmp_path):
    """A first token like no other: in no statistic but its own."""
    model = small_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[254] = 0
        model.model.embed_tokens.weight[254, 3] = 50.0
    save(model, tmp_path)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    from tokenizers.processors import TemplateProcessing

    fast._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 254)])
    fast.save_pretrained(tmp_path)
    write_text(tmp_path / "text.txt", 200)
    report = inspect(tmp_path)
    assert report["text"]["bos_tokens"] == report["text"]["sequences"] == 7
    assert report["bos"]["outlier_dims"] == [3] and report["bos"]["absmax"] > 6
    assert all(f["dim"] != 3 for f in report["features"])
    assert report["layers"][0]["sites"][0]["rows"] == 200


@pytest.mark.parametrize("name", ["opt", "gptj", "bloom", "mixtral", "gpt2", "cohere", "phi3", "gpt_neox"])
def test_sites_of_other_architectures(tmp_path, name):
    make_model(name, tmp_path)
    add_tokenizer(tmp_path)
    write_text(tmp_path / "text.txt", 200)
    report = inspect(tmp_path, ablate=True)
    kinds = [site["kind"] for site in report["layers"][0]["sites"]]
    expected = ["attention input", "attention output", "ffn input", "ffn output"]
    if name == "mixtral":  # its experts are one fused tensor, whose second half is not seen
        expected = expected[:3]
        assert any("fused experts" in note for note in report["notes"])
    assert sorted(kinds) == expected
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_is_inspected_too(tmp_path, bits):
    demo, text = ROOT / "examples/demo-model", ROOT / "examples/stories.jsonl"
    qcli.quantize(str(demo), tmp_path / "quantized", bits=bits)
    report = inspect_outliers(str(tmp_path / "quantized"), text=text, tokens=600, device="cpu").summary()
    assert {f["dim"] for f in report["features"] if f["outlier"]} == {7, 21, 38, 52}
    assert report["recommendation"] is None and "quantized already" in report["notes"][0]
    assert report["model"]["quantization"] == {4: "nf4", 8: "llm-int8"}[bits] and report["model"]["parameters"] is None


def test_nan_is_named_by_layer(tmp_path):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[11, 0] = torch.nan
    save(model, tmp_path)
    write_text(tmp_path / "text.txt", 64)
    with pytest.raises(NonFiniteError, match=r"input of model.layers.2.mlp.down_proj holds NaN or infinity in 1 of 96 .* 11"):
        inspect(tmp_path)


def test_bad_options_and_texts(folder, tmp_path):
    path = folder[2]
    with pytest.raises(UsageError, match="--threshold is 0"):
        inspect(path, threshold=0.0)
    with pytest.raises(UsageError, match="context holds 64"):
        inspect_outliers(str(path), text=path / "text.txt", sequence_length=65)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="empty.txt holds 0 tokens"):
        inspect_outliers(str(path), text=tmp_path / "empty.txt")


def test_a_model_without_outliers_says_so(tmp_path):
    save(small_llama(), tmp_path)
    write_text(tmp_path / "text.txt", 300)
    report = inspect(tmp_path, ablate=True)
    assert report["features"] == [] and report["table4"]["outliers"] == 0
    assert any(note.startswith("Nothing was ablated") for note in report["notes"])
    assert report["recommendation"]["why"][0] == "No dimension meets the paper's criteria of an outlier feature."
    assert report["model"]["hidden_size"] == HIDDEN
