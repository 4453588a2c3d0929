"""The verb `inspect_outliers`: from a model's name to the report."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from qcli import methods
from qcli.errors import UsageError
from qcli.evaluation.score import Form, score
from qcli.evaluation.statistics import perplexity
from qcli.evaluation.tokens import TokenScores
from qcli.outliers import paper, results
from qcli.outliers.ablation import RANDOM, WHOLE, WITHOUT, Ablation, random_dims
from qcli.outliers.attention import LayerAttention
from qcli.outliers.damage import METHODS, SAMPLE_TOKENS, weight_of
from qcli.outliers.features import Feature, find_features, hidden_sites
from qcli.outliers.measure import LayerMeasure, Meter
from qcli.outliers.recommend import Recommendation, recommend
from qcli.outliers.sites import HIDDEN
from qcli.process import available_memory
from qcli.schemes import NAMED, Scheme
from qcli.sizes import format_bytes
from qcli.streaming.corpus import Corpus, read_windows
from qcli.streaming.reading import Reading, hidden_bytes, weight_bytes
from qcli.streaming.skeleton import Skeleton

DEFAULT_TOKENS = 8192
Progress = Callable[[int, int], AbstractContextManager]


def inspect_outliers(
    model: str,
    *,
    text: str | Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    threshold: float = paper.THRESHOLD,
    ablate: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Runs text through `model` (a folder or a hub id), block by block, and returns the report: a dict that is fit for JSON.

    `text` is a file (.jsonl: a document a line), or None for the text that comes with qcli; `tokens` of it in windows of
    `sequence_length`. Values of magnitude `threshold` and more are outliers. `ablate` runs it a second time with the outlier
    features zeroed. `progress(total, done)` gives a context manager with advance(bytes, name).

    Raises QcliError kinds: UsageError for options, texts and models that are no causal language model, CheckpointError,
    HubError, DeviceError, and NonFiniteError, which names the layer.
    """
    if not 0 < threshold < float("inf"):
        raise UsageError(f"--threshold is {threshold}, expected a number above 0", "6.0 is the paper's value.")

    def open_model(attention: str | None = None) -> Skeleton:
        return Skeleton(
            model, dtype=dtype, device=device, attention=attention, revision=revision, trust_remote_code=trust_remote_code
        )

    skeleton = open_model()
    config = skeleton.model.config.get_text_config(decoder=True)
    corpus = read_windows(
        skeleton.tokenizer,
        text,
        tokens=tokens,
        default_tokens=DEFAULT_TOKENS,
        sequence_length=sequence_length,
        model_limit=getattr(config, "max_position_embeddings", None),
    )
    _check_room(skeleton, corpus, 3 if ablate else 1)
    work = Reading.work(skeleton)
    with _shown(progress, work * (2 if ablate else 1)) as advance:
        meter = _meter(skeleton, corpus, threshold)
        reading = Reading(skeleton, corpus.windows, advance, observer=meter)
        _, (scores,) = score(None, [Form(model, reading)], corpus.windows)
        features = find_features(meter.layers, meter.union.values(), config.hidden_size)
        loading = ["--revision", revision] if revision else []
        loading += ["--trust-remote-code"] if trust_remote_code else []
        loading += ["--set", "modules=rules"] if skeleton.layout.explicit_skip else []
        found = recommend(model, meter.layers, features, threshold, loading)
        report = _report(skeleton, corpus, meter, features, found)
        report["table4"]["perplexity"] = _perplexity(scores, corpus)
        if ablate:
            _ablate(report, open_model, corpus, meter.layers, features, config.hidden_size, advance)
    return report


def _check_room(skeleton: Skeleton, corpus: Corpus, variants: int) -> None:
    """Raises UsageError where the hidden states, which wait for each block together, have no room beside the largest block."""
    free = torch.cuda.mem_get_info()[0] if skeleton.device.type == "cuda" else available_memory()
    states = hidden_bytes([skeleton], corpus.windows, variants)
    block = max(weight_bytes(unit) for unit in skeleton.units)
    if free is None or states + block <= free:
        return
    what = f"the hidden states of {corpus.tokens:,} tokens take {format_bytes(states)}, the largest block {format_bytes(block)}"
    fewer = corpus.tokens * max(free - block, 0) // (2 * states)
    raise UsageError(
        f"{what}, and {format_bytes(free)} of memory are free",
        f"Read fewer: --tokens {fewer}." if fewer > 1 else "No choice of --tokens would do; free some memory.",
    )


@contextmanager
def _shown(progress: Progress | None, total: int) -> Iterator[Callable[[int, str], None]]:
    if progress is None:
        yield lambda count, name: None
        return
    with progress(total, 0) as shown:
        yield shown.advance


def _meter(skeleton: Skeleton, corpus: Corpus, threshold: float) -> Meter:
    sample, taken = [], 0
    for i, window in enumerate(corpus.windows):
        if taken < SAMPLE_TOKENS:
            sample.append(i)
            taken += len(window.ids)
    quantized = skeleton.quantizer is not None
    wanted = {} if quantized else {name: methods.make(_with_threshold(NAMED[name], threshold)) for name in METHODS}
    return Meter(skeleton, threshold, len(corpus.prefix), frozenset(sample), wanted)


def _with_threshold(scheme: Scheme, threshold: float) -> Scheme:
    return replace(scheme, threshold=threshold) if scheme.threshold else scheme


def _report(skeleton: Skeleton, corpus: Corpus, meter: Meter, features: list[Feature], found: Recommendation | None) -> dict:
    layers, hidden_size = meter.layers, meter.hidden_size
    window = corpus.windows[0].ids[:64]
    tokens = [skeleton.tokenizer.decode([token]) for token in window]
    return results.VERSION | {
        "model": results.describe_model(skeleton, len(layers)),
        "text": results.describe_text(corpus),
        "threshold": meter.threshold,
        "min_layers": paper.MIN_LAYERS,
        "min_positions": paper.MIN_POSITIONS,
        "layers": [results.describe_layer(i, layer) for i, layer in enumerate(layers)],
        "features": results.describe_features(features),
        "table4": results.table_4(features, None),
        "massive_activations": _massive(skeleton, corpus, layers),
        "super_weights": [{"layer": i} | asdict(weight) for i, layer in enumerate(layers) for weight in layer.super_weights],
        "attention": None,
        "bos": _bos(corpus, layers),
        "ablation": None,
        "charts": results.charts(layers, features, tokens, hidden_size),
        "notes": _notes(skeleton, layers, hidden_size),
        "recommendation": found and found.summary(),
    }


def _massive(skeleton: Skeleton, corpus: Corpus, layers: Sequence[LayerMeasure]) -> list[dict[str, object]]:
    """Massive activations, those of the same layer, dimension, position and token as one: the largest, with how many there were."""
    found: dict[tuple, dict[str, object]] = {}
    for i, layer in enumerate(layers):
        for m in layer.massive:
            token = skeleton.tokenizer.decode([corpus.windows[m.window].ids[m.position]])
            entry = found.setdefault(
                (i, m.dim, m.position if m.position == 0 else -1, token),
                {"layer": i, "position": m.position, "token": token, "dim": m.dim, "value": 0.0, "sequences": 0},
            )
            entry["sequences"] += 1
            if abs(m.value) > abs(entry["value"]):
                entry |= {"value": m.value, "median": m.median, "position": m.position}
    return sorted(found.values(), key=lambda e: -abs(e["value"]))[:64]


def _bos(corpus: Corpus, layers: Sequence[LayerMeasure]) -> dict[str, object] | None:
    if not corpus.bos:
        return None
    stats = [s.bos for layer in layers for s in layer.sites if s.site.kind in HIDDEN and s.bos.rows]
    if not stats:
        return None
    dims = sorted({d for s in stats for d in s["count"].nonzero().view(-1).tolist()})
    return {
        "positions": len(corpus.windows) * len(corpus.prefix),
        "absmax": max(results.number(s.absmax.max()) for s in stats),
        "outlier_dims": dims[:64],
    }


def _notes(skeleton: Skeleton, layers: Sequence[LayerMeasure], hidden_size: int) -> list[str]:
    notes = []
    kinds = sorted({site.site.kind for layer in layers for site in layer.sites})
    lacking = [i for i, layer in enumerate(layers) if not hidden_sites(layer, hidden_size)]
    if lacking:
        notes.append(
            f"{len(lacking)} of {len(layers)} blocks have no input of attention or FFN that is {hidden_size} wide, such as "
            f"{layers[lacking[0]].name}; sites found: {', '.join(kinds) or 'none'}."
        )
    if skeleton.quantizer is not None:
        notes.append("The weights are quantized already, so what each method would cost is not measured; inspect the original.")
    unseen = [
        (layer.name, path)
        for layer in layers
        for site in layer.sites
        for path, module in site.site.modules.items()
        if not skeleton.quantizer and (not site.damage or weight_of(module) is None)
    ]
    if unseen:
        notes.append(
            f"What rounding costs was not measured at {len(unseen)} modules, fused experts or layers that see only a part of the "
            f"tokens, such as {'.'.join(unseen[0])}."
        )
    return notes


def _ablate(
    report: dict,
    open_model: Callable,
    corpus: Corpus,
    layers: Sequence[LayerMeasure],
    features: Sequence[Feature],
    hidden_size: int,
    advance: Callable[[int, str], None],
) -> None:
    """Runs the text once more, whole, without the outlier features and without as many others; writes it into the report."""
    dims = sorted(f.dim for f in features if f.outlier)
    if not dims:
        report["notes"].append("Nothing was ablated: no dimension meets the criteria of an outlier feature.")
        return
    others = random_dims(hidden_size, [f.dim for f in features if f.outlier], len(dims))
    skeleton = open_model("eager")
    ablation = Ablation(layers, {WITHOUT: dims, RANDOM: others}, len(corpus.prefix))
    reading = Reading(skeleton, corpus.windows, advance, variants=(WHOLE, WITHOUT, RANDOM), observer=ablation)
    forms = [Form(f"{report['model']['name']}, {variant}", reading, variant) for variant in (WHOLE, WITHOUT, RANDOM)]
    _, scores = score(None, forms, corpus.windows)
    values = [_perplexity(s, corpus) for s in scores]
    report["ablation"] = {
        "dims": dims,
        "random_dims": others,
        "top1": _top1(ablation.attention),
        "perplexity": dict(zip((WHOLE, WITHOUT, RANDOM), values)) | {"tokens": corpus.scored},
    }
    report["attention"] = _attention(ablation.attention)
    if top1 := report["ablation"]["top1"]:
        report["table4"] |= {"top1_with": top1["with"], "top1_without": top1[WITHOUT]}
    else:
        report["notes"].append("The attention modules show no probabilities, so only perplexity was ablated.")


def _perplexity(scores: TokenScores, corpus: Corpus) -> float | None:
    with np.errstate(over="ignore"):
        return results.number(perplexity(scores.loss, corpus.scored_bytes).perplexity.value)


def _top1(attention: Sequence[LayerAttention]) -> dict[str, float] | None:
    rows = sum(layer.rows for layer in attention)
    if not rows:
        return None
    return {name: sum(layer.top1[name] for layer in attention) / rows for name in ("with", WITHOUT, RANDOM)}


def _attention(attention: Sequence[LayerAttention]) -> dict[str, object] | None:
    top1 = _top1(attention)
    if top1 is None:
        return None
    sinks = [layer.sinks for layer in attention]
    return {
        "sink_share": sum(s for s, _ in sinks) / max(sum(heads for _, heads in sinks), 1),
        "top1": top1["with"],
        "layers": [
            {"layer": i} | {f"top1_{name}": layer.mean_top1(name) for name in ("with", WITHOUT, RANDOM)}
            for i, layer in enumerate(attention)
        ],
    }
