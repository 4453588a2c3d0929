"""The verb `inspect_outliers`: from a model's name to an Inspection."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from qcli import methods
from qcli.errors import UsageError
from qcli.evaluation.score import Contender, score
from qcli.evaluation.statistics import perplexity
from qcli.evaluation.tokens import TokenScores
from qcli.outliers import paper, results
from qcli.outliers.ablation import RANDOM, WHOLE, WITHOUT, Ablation, describe_attention, mean_top1, random_dims
from qcli.outliers.damage import METHODS, SAMPLE_TOKENS, weight_of
from qcli.outliers.features import find_features, hidden_sites
from qcli.outliers.inspection import Ablated, Attention, Inspection
from qcli.outliers.measure import LayerMeasure, Meter
from qcli.outliers.recommend import recommend
from qcli.process import available_memory
from qcli.progress import Advance, Progress, shown
from qcli.schemes import NAMED, Scheme
from qcli.sizes import format_bytes
from qcli.streaming.corpus import Corpus, read_windows
from qcli.streaming.reading import Reading, hidden_bytes, weight_bytes
from qcli.streaming.skeleton import Skeleton

DEFAULT_TOKENS = 8192
TOKENS_SHOWN = 64  # of the first window, at most, in the page


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
) -> Inspection:
    """Runs text through `model` (a folder or a hub id), block by block, and returns what it finds.

    `text` is a file (.jsonl: a document in each line), or None for the text that comes with qcli. `tokens` of it are read in
    windows of `sequence_length`. Values of magnitude `threshold` and more are outliers. `ablate` runs the text again with the
    outlier features zeroed. `progress` is that of qcli.progress.

    Raises UsageError (for options, texts, and models that are no causal language model), CheckpointError, HubError, DeviceError,
    and NonFiniteError, which names the layer.
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
    with shown(progress, Reading.work(skeleton) * (2 if ablate else 1)) as advance:
        meter = _meter(skeleton, corpus, threshold)
        reading = Reading(skeleton, corpus.windows, advance, observer=meter)
        _, (scores,) = score(None, [Contender(model, reading)], corpus.windows)
        layers, hidden_size = meter.layers, meter.hidden_size
        features = find_features(layers, meter.union.values(), hidden_size)
        dims = sorted(f.dim for f in features if f.outlier)
        second = _Second()
        if ablate and dims:
            others = random_dims(hidden_size, dims, len(dims))
            second = _ablate(open_model("eager"), corpus, layers, dims, others, advance)
        elif ablate:
            second = _Second(note="Nothing was ablated: no dimension meets the criteria of an outlier feature.")
    loading = ["--revision", revision] if revision else []
    loading += ["--trust-remote-code"] if trust_remote_code else []
    loading += ["--set", "modules=rules"] if skeleton.layout.explicit_skip else []
    tokens_shown = [skeleton.tokenizer.decode([token]) for token in corpus.windows[0].ids[:TOKENS_SHOWN]]
    return Inspection(
        model=results.describe_model(skeleton, len(layers)),
        text=results.describe_text(corpus),
        threshold=threshold,
        min_layers=paper.MIN_LAYERS,
        min_positions=paper.MIN_POSITIONS,
        layers=[results.describe_layer(i, layer) for i, layer in enumerate(layers)],
        features=features[: results.FEATURES_KEPT],
        table4=results.table_4(features, _perplexity(scores, corpus), second.ablation and second.ablation.top1),
        massive_activations=results.massive_activations(skeleton, corpus, layers),
        super_weights=[weight for layer in layers for weight in layer.super_weights],
        attention=second.attention,
        bos=results.first_tokens(corpus, layers),
        ablation=second.ablation,
        charts=results.charts(layers, features, tokens_shown, hidden_size),
        notes=[*_notes(skeleton, layers, hidden_size), *([second.note] if second.note else [])],
        recommendation=recommend(model, layers, features, threshold, loading),
    )


def _check_room(skeleton: Skeleton, corpus: Corpus, variants: int) -> None:
    """Raises UsageError where the hidden states of all tokens have no room in memory beside the largest block."""
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


@dataclass(frozen=True)
class _Second:
    """What the second pass found."""

    ablation: Ablated | None = None
    attention: Attention | None = None
    note: str = ""


def _ablate(
    skeleton: Skeleton, corpus: Corpus, layers: Sequence[LayerMeasure], dims: list[int], others: list[int], advance: Advance
) -> _Second:
    """Runs the text again three times over: whole, without `dims`, and without `others`."""
    ablation = Ablation(layers, {WITHOUT: dims, RANDOM: others}, len(corpus.prefix))
    reading = Reading(skeleton, corpus.windows, advance, variants=(WHOLE, WITHOUT, RANDOM), observer=ablation)
    contenders = [Contender(f"{skeleton.source.label}, {variant}", reading, variant) for variant in (WHOLE, WITHOUT, RANDOM)]
    _, scores = score(None, contenders, corpus.windows)
    perplexities = dict(zip((WHOLE, WITHOUT, RANDOM), (_perplexity(s, corpus) for s in scores)))
    top1 = mean_top1(ablation.attention)
    return _Second(
        Ablated(dims, others, top1, perplexities | {"tokens": corpus.scored}),
        describe_attention(ablation.attention),
        "" if top1 else "The attention modules show no probabilities, so only perplexity was ablated.",
    )


def _perplexity(scores: TokenScores, corpus: Corpus) -> float | None:
    with np.errstate(over="ignore"):
        return results.number(perplexity(scores.loss, corpus.scored_bytes).perplexity.value)
