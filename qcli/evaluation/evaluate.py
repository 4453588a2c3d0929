"""The verb `evaluate`: what a model predicts on text, alone, against another, or under each method of quantization."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from qcli import formats, schemes
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.source import Source
from qcli.errors import UsageError
from qcli.evaluation import calibrated, on_cluster
from qcli.evaluation.methods import Rounding, quantizable
from qcli.evaluation.models import Models, Scored, prepare
from qcli.evaluation.result import Evaluation, Protocol, Row
from qcli.evaluation.speed import Speed, measure
from qcli.evaluation.statistics import comparison, perplexity
from qcli.evaluation.tokens import TokenScores
from qcli.formats import Weight
from qcli.methods.choosing import made
from qcli.nn.low_rank import adapter_bytes
from qcli.progress import Progress
from qcli.recipe import Choice
from qcli.schemes import Scheme
from qcli.streaming.corpus import Corpus, Window, read_windows
from qcli.streaming.skeleton import Skeleton


def evaluate(
    model: str,
    *,
    against: str | None = None,
    adapter: str | None = None,
    methods: str | Iterable[str] | None = None,
    kv_dtype: str | None = None,
    head: int | None = None,
    text: str | Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    stride: int | None = None,
    speed: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cluster: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measures `model`, a folder or hub id, quantized or not, on `text`, cut by qcli.streaming.corpus.read_windows.

    `against` names a base to compare it with, token by token. Both read what the tokenizer of `model` makes of the text.
    `adapter`, a folder or hub id, is a LoRA adapter that `model` runs with, and the base does not.
    `kv_dtype` int8 rounds the keys and values of `model` as `generate` does for an int8 cache. `head`, 8 or 4, quantizes the output
    head of an unquantized model as `quantize` does. With either the model is compared with itself, unless `against` names another.
    `methods`, "all" or names of qcli.schemes, compares simulated methods with the unquantized model. `nf4-calibrated` and the like
    are rounded by up to 8,192 tokens that follow the scored ones. A method that does not fit the model's shapes is left out, with a
    note. `speed` also loads whole models and times them. `dtype` auto is each checkpoint's own. With `methods` it is float32, so
    that the cost of a method is not mixed with the rounding of sums. `progress` is that of qcli.progress. `cluster` is an address
    as qcli.cluster.engine takes it: so many `workers` of that Ray cluster read the text, one a machine if None.

    Blocks are streamed. Memory holds one block (with `methods`, a rounded copy too) and up to HIDDEN_BYTES of hidden states, for
    every model or method. A text with more is read in several runs.

    Raises UsageError, CheckpointError, HubError, DeviceError, ClusterError; NonFiniteError where logits are not finite.
    """
    if cluster is not None and speed:
        raise UsageError("--cluster and --speed were both given", "Leave out one of them: a speed is that of one machine.")
    methods = methods if methods is None or isinstance(methods, str) else list(methods)
    options: dict[str, Any] = {"against": against, "adapter": adapter, "methods": methods, "kv_dtype": kv_dtype, "head": head}
    options |= {"speed": speed, "dtype": dtype, "device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    models = prepare(model, **options)
    skeleton, base, notes = models.skeleton, models.base, models.notes
    limit = min((n for each in models.skeletons if (n := _context(each))), default=None)
    reading = {"tokens": tokens, "sequence_length": sequence_length, "stride": stride, "model_limit": limit}
    texts: Sequence[Window] = ()
    if models.forms:
        corpus, following = calibrated.read_both(skeleton.tokenizer, text, **reading)
        texts = following.windows
        notes.append(calibrated.about(following))
    else:
        corpus = read_windows(skeleton.tokenizer, text, **reading)
    protocol = Protocol.of(corpus, str(skeleton.dtype).removeprefix("torch."), skeleton.device.type)
    with on_cluster.pool(cluster, workers, model, options) as pool:
        found = on_cluster.score_on(pool, models, corpus.windows, texts, progress)
    rows = _simulated(models, found, corpus) if models.chosen else _measured(models, found.scores, corpus)
    if models.calls is not None and not found.calls:
        raise UsageError(
            f"--kv-dtype 8: {type(skeleton.model).__name__} does not use transformers' attention interface",
            "Its cache cannot be rounded here.",
        )
    source = skeleton.source
    result = Evaluation(source.label, source.revision, protocol, rows, simulated=bool(models.chosen), notes=notes)
    if base is not None and base.dtype != skeleton.dtype:
        result.notes.append(f"{base.source.label} is computed in {str(base.dtype).removeprefix('torch.')}")
    if models.chosen and (experts := skeleton.layout.expert_parameters):
        result.notes.append(
            f"{experts:,} parameters of fused experts are no linear layers to `qcli quantize`: no method quantizes them"
        )
    if speed:
        running = {"device": device, "trust_remote_code": trust_remote_code, "dtype": dtype}
        _time(result, model, against, adapter, revision, corpus, limit, running)
    return result


def _context(skeleton: Skeleton) -> int | None:
    return getattr(skeleton.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _measured(models: Models, scores: Sequence[TokenScores], corpus: Corpus) -> list[Row]:
    """The model, after its base where there is one."""
    of_base = scores[0] if len(scores) > 1 else None
    rows = []
    for name, skeleton, scored in zip(models.labels, models.skeletons, scores):
        source, linears = skeleton.source, quantizable(skeleton)
        size = sum(info.nbytes for info in source.tensors.values())
        if models.adapter is not None and adapter_bytes(skeleton.model):
            size += models.adapter.nbytes
        if skeleton is models.skeleton and models.of_head is not None:
            size += _saved_by_head(skeleton, models.of_head)
        bits = 8 * _linear_bytes(source, linears) / sum(x.out_features * x.in_features for x in linears)
        rows.append(_row(name, scored, of_base, corpus, size, bits))
    return rows


def _saved_by_head(skeleton: Skeleton, choice: Choice) -> int:
    """What a quantized head changes in the bytes of a checkpoint: a number below zero."""
    linear = skeleton.output_head.linear
    stored = skeleton.source.tensors[linear.tensor]
    weight = Weight(linear.tensor, linear.out_features, linear.in_features, stored.dtype)
    return formats.stored_bytes(made(choice).scheme, weight) - stored.nbytes


def _simulated(models: Models, found: Scored, corpus: Corpus) -> list[Row]:
    """The unquantized model, and every method compared with it."""
    skeleton, linears = models.skeleton, quantizable(models.skeleton)
    whole = sum(info.nbytes for info in skeleton.source.tensors.values())
    rest = whole - _linear_bytes(skeleton.source, linears)
    count = sum(x.out_features * x.in_features for x in linears)
    rows = []
    for scheme, scored in zip(models.chosen, found.scores):
        rounding = found.roundings[scheme.name]
        size = sum(_stored_bytes(scheme, x, skeleton.source, rounding) for x in linears)
        row = _row(scheme.name, scored, found.scores[0], corpus, rest + size, 8 * size / count)
        row.weight_sqnr, row.activation_sqnr = rounding.weights.sqnr, rounding.activations.sqnr
        row.ordinary_activation_sqnr = rounding.ordinary.sqnr
        rows.append(row)
    return rows


def _row(name: str, scored: TokenScores, base: TokenScores | None, corpus: Corpus, size: int, bits: float) -> Row:
    compared = None
    if base is not None and scored is not base:
        compared = comparison(base.loss, scored.loss, scored.divergence, scored.agrees)
    return Row(name, perplexity(scored.loss, corpus.scored_bytes), size, bits, compared)


def _stored_bytes(scheme: Scheme, linear: Linear, source: Source, rounding: Rounding) -> int:
    dtype = source.tensors[linear.tensor].dtype
    outlier_columns = rounding.outlier_columns(linear.module)
    return formats.stored_bytes(scheme, Weight(linear.tensor, linear.out_features, linear.in_features, dtype), outlier_columns)


def _linear_bytes(source: Source, linears: Sequence[Linear]) -> int:
    """Bytes of these weights in the checkpoint, with their scales and tables."""
    owners = {linear.tensor for linear in linears}
    companions = {name: weight for each in formats.all_formats() for name, weight in each.companions(source.tensors).items()}
    return sum(info.nbytes for name, info in source.tensors.items() if companions.get(name, name) in owners)


def _time(
    result: Evaluation,
    model: str,
    against: str | None,
    adapter: str | None,
    revision: str | None,
    corpus: Corpus,
    limit: int | None,
    running: dict,
) -> None:
    """Measures the speed of each row that can be run."""
    ids = corpus.windows[0].ids

    def timed(name: str, **options: object) -> Speed:
        return measure(name, ids, limit, **running, **options)

    if result.simulated:
        for row in result.rows:
            if row.name == schemes.UNQUANTIZED.name:
                row.speed = timed(model, revision=revision)
            elif row.name in formats.written():
                row.speed = timed(model, method=row.name, revision=revision)
        result.notes.append("speed is that of the methods that qcli runs, each loaded whole")
    else:
        result.rows[-1].speed = timed(model, adapter=adapter, revision=revision)
        if against is not None:
            result.rows[0].speed = timed(against)
    first = next(row.speed for row in result.rows if row.speed)
    result.notes.append(
        f"speed: a prompt of {first.prompt_tokens:,} tokens, then one token at a time; dtype {running['dtype']}"
        f"{' (the one in config.json)' if running['dtype'] == 'auto' else ''}; peak memory from loading on"
    )
