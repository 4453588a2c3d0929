"""The verb `inspect_outliers`: from a model's name to an Inspection."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcli.errors import UsageError
from qcli.evaluation.statistics import perplexity
from qcli.evaluation.tokens import TokenScores
from qcli.outliers import on_cluster, paper, results
from qcli.outliers.ablation import RANDOM, WITHOUT, Zeroed, Zeroing, describe_attention, mean_top1, random_dims
from qcli.outliers.damage import Sample
from qcli.outliers.features import find_features, hidden_sites
from qcli.outliers.inspection import Ablated, Attention, Inspection
from qcli.outliers.measure import Asked
from qcli.outliers.measured import LayerMeasure
from qcli.outliers.passes import Opening
from qcli.outliers.recommend import recommend
from qcli.progress import Progress, bar_of
from qcli.streaming.corpus import Corpus, read_windows
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
    cluster: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Runs text through `model` (a folder or a hub id), block by block, and returns what it finds.

    `text` is a file (.jsonl: a document in each line), or None for the text that comes with qcli. `tokens` of it are read in
    windows of `sequence_length`. Values of magnitude `threshold` and more are outliers. `ablate` runs the text again with the
    outlier features zeroed. `progress` is that of qcli.progress. `cluster` is an address as qcli.cluster.engine takes it: so many
    `workers` of that Ray cluster pass the text, one a machine if None.

    Raises UsageError (for options, texts, and models that are no causal language model), CheckpointError, HubError, DeviceError,
    ClusterError, and NonFiniteError, which names the layer.
    """
    if not 0 < threshold < float("inf"):
        raise UsageError(f"--threshold is {threshold}, expected a number above 0", "6.0 is the paper's value.")

    opening = Opening(model, dtype, device, revision, trust_remote_code)
    skeleton = opening.skeleton()
    corpus = read_windows(
        skeleton.tokenizer,
        text,
        tokens=tokens,
        default_tokens=DEFAULT_TOKENS,
        sequence_length=sequence_length,
        model_limit=getattr(skeleton.model.config.get_text_config(decoder=True), "max_position_embeddings", None),
    )
    prefix = len(corpus.prefix)
    with on_cluster.passes(cluster, workers, opening, skeleton, corpus.windows) as passes:
        passes.check_room(3 if ablate else 1)
        with bar_of(progress, passes.work * (2 if ablate else 1)) as passes.bar:
            measured, scores = passes.measure(Asked(threshold, prefix, Sample.of(corpus.windows, prefix)))
            features = find_features(measured)
            dims = sorted(f.dim for f in features if f.outlier)
            second = _Second()
            if ablate and dims:
                others = random_dims(measured.hidden_size, dims, len(dims))
                zeroing = Zeroing.of(measured.layers, {WITHOUT: dims, RANDOM: others}, prefix)
                second = _second_pass(zeroing, passes.ablate(zeroing), corpus)
            elif ablate:
                second = _Second(note="Nothing was ablated: no dimension meets the criteria of an outlier feature.")
    layers, hidden_size = measured.layers, measured.hidden_size
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


def _notes(skeleton: Skeleton, layers: Sequence[LayerMeasure], hidden_size: int) -> list[str]:
    notes = []
    kinds = sorted({site.kind for layer in layers for site in layer.sites})
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
        for path in (site.weightless if site.damage else site.modules)
        if not skeleton.quantizer
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


def _second_pass(zeroing: Zeroing, zeroed: Zeroed, corpus: Corpus) -> _Second:
    attention = list(zeroed.attention.values())
    perplexities: dict[str, float | None] = {name: _perplexity(scores, corpus) for name, scores in zeroed.scores.items()}
    top1 = mean_top1(attention)
    return _Second(
        Ablated(zeroing.dims[WITHOUT], zeroing.dims[RANDOM], top1, perplexities | {"tokens": corpus.scored}),
        describe_attention(attention),
        "" if top1 else "The attention modules show no probabilities, so only perplexity was ablated.",
    )


def _perplexity(scores: TokenScores, corpus: Corpus) -> float | None:
    with np.errstate(over="ignore"):
        return results.number(perplexity(scores.loss, corpus.scored_bytes).perplexity.value)
