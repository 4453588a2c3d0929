"""The verb `evaluate`: what a model predicts on text, alone, against another, or under each method of quantization."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from qcli import formats, schemes
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.source import Source
from qcli.errors import UsageError, one_of, together
from qcli.evaluation import calibrated
from qcli.evaluation.calibrated import CalibratedMethods
from qcli.evaluation.int8_cache import round_cache
from qcli.evaluation.methods import Methods, Rounding, SequencesMixed, quantizable
from qcli.evaluation.result import Evaluation, Protocol, Row
from qcli.evaluation.score import Contender, score_all
from qcli.evaluation.speed import Speed, measure
from qcli.evaluation.statistics import comparison, perplexity
from qcli.evaluation.tokens import TokenScores
from qcli.evaluation.vocabularies import check_same_tokens
from qcli.formats import Weight
from qcli.loading.adapter import Adapter, open_adapter
from qcli.loading.attach import attach
from qcli.methods._method import Method
from qcli.methods.choosing import head_choice, made
from qcli.nn.low_rank import adapter_bytes
from qcli.progress import Advance, Progress, shown
from qcli.recipe import KEEP, Choice
from qcli.schemes import Scheme
from qcli.streaming.corpus import Corpus, Window, read_windows
from qcli.streaming.reading import Reading, runs
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
    that the cost of a method is not mixed with the rounding of sums. `progress` is that of qcli.progress.

    Blocks are streamed. Memory holds one block (with `methods`, a rounded copy too) and up to HIDDEN_BYTES of hidden states, for
    every model or method. A text with more is read in several runs.

    Raises UsageError, CheckpointError, HubError, DeviceError; NonFiniteError where logits are not finite.
    """
    if against is not None and methods is not None:
        raise UsageError("--against and --methods were both given", "Leave out one: --methods compares with MODEL itself.")
    if adapter is not None and methods is not None:
        raise UsageError(
            "--adapter and --methods were both given", "Leave out one, or make one model of the two first: qcli merge."
        )
    of_head = head_choice(head, Choice(KEEP))
    for option, given in (("--kv-dtype", kv_dtype), ("--head", of_head)):
        if given is not None and methods is not None:
            raise UsageError(f"{option} and --methods were both given", "Leave out one of them.")
        if given is not None and speed:
            raise UsageError(
                f"{option} and --speed were both given", "Leave out one of them: qcli generate times a model as it is run."
            )
    chosen, forms = calibrated.chosen(methods) if methods is not None else ([], {})
    adapted = None if adapter is None else open_adapter(adapter)
    running = {"device": device, "trust_remote_code": trust_remote_code}
    computing = "float32" if chosen and dtype == "auto" else dtype
    skeleton = Skeleton(model, dtype=computing, revision=revision, head=of_head, **running)
    if chosen and skeleton.quantizer is not None:
        raise UsageError(
            f"--methods: {model} is quantized already", "Give the unquantized model, or measure this one with --against."
        )
    if of_head is not None and skeleton.source.quantization:
        raise UsageError(f"--head: {model} is quantized already", "Give the unquantized model, or measure this one with --against.")
    base = Skeleton(against, dtype=computing, **running) if against is not None else None
    label, rounding = skeleton.source.label, None
    if adapted is not None:
        adapted.warn_of_other_base(skeleton.source, None)
        attach(skeleton.model, adapted, label)
        label = f"{label}, adapter {adapted.label}"
    of_base = against or label
    if base is None and (kv_dtype is not None or of_head is not None):
        base = Skeleton(model, dtype=computing, revision=revision, **running)
        if adapted is not None:
            attach(base.model, adapted, base.source.label)
    if kv_dtype is not None:
        one_of("kv_dtype", kv_dtype, ("int8",))
        rounding = round_cache(skeleton.model)
        label = f"{label}, int8 cache"
    if of_head is not None:
        label = f"{label}, head in {of_head.method}"
    if base is not None:
        check_same_tokens(skeleton, base)
    chosen, notes = _fitting(chosen, skeleton)
    limit = min((n for s in (skeleton, base) if s and (n := _context(s))), default=None)
    forms = {scheme.name: forms[scheme.name] for scheme in chosen if scheme.name in forms}
    reading = {"tokens": tokens, "sequence_length": sequence_length, "stride": stride, "model_limit": limit}
    if forms:
        corpus, texts = calibrated.read_both(skeleton.tokenizer, text, **reading)
        notes.append(calibrated.about(texts))
    else:
        corpus, texts = read_windows(skeleton.tokenizer, text, **reading), None
    protocol = Protocol.of(corpus, str(skeleton.dtype).removeprefix("torch."), skeleton.device.type)
    skeletons = [s for s in (base, skeleton) if s is not None]
    work = sum(Reading.work(s) for s in skeletons) * len(runs(skeletons, corpus.windows, max(len(chosen), 1)))
    with shown(progress, work) as advance:
        if chosen:
            rows = _simulated(skeleton, chosen, corpus, advance, forms, texts.windows if texts else ())
        else:
            rows = _measured(skeletons, [of_base, label][-len(skeletons) :], of_head, adapted, corpus, advance)
    if rounding is not None and not rounding["calls"]:
        raise UsageError(
            f"--kv-dtype 8: {type(skeleton.model).__name__} does not use transformers' attention interface",
            "Its cache cannot be rounded here.",
        )
    source = skeleton.source
    result = Evaluation(source.label, source.revision, protocol, rows, simulated=bool(chosen), notes=notes)
    if base is not None and base.dtype != skeleton.dtype:
        result.notes.append(f"{base.source.label} is computed in {str(base.dtype).removeprefix('torch.')}")
    if chosen and (experts := skeleton.layout.expert_parameters):
        result.notes.append(
            f"{experts:,} parameters of fused experts are no linear layers to `qcli quantize`: no method quantizes them"
        )
    if speed:
        running["dtype"] = dtype
        _time(result, model, against, adapter, revision, corpus, limit, running)
    return result


def _fitting(chosen: Sequence[Scheme], skeleton: Skeleton) -> tuple[list[Scheme], list[str]]:
    """(schemes that every linear layer can have, notes on the others). Raises UsageError where only the unquantized one is left."""
    refused: dict[str, dict[str, list[str]]] = {}
    for scheme in chosen:
        for linear in quantizable(skeleton):
            if reason := formats.misfit(scheme, linear.out_features, linear.in_features):
                refused.setdefault(scheme.name, {}).setdefault(reason, []).append(linear.module)
    notes = [
        f"{name} is left out: {reason} ({together('modules', modules)})"
        for name, reasons in refused.items()
        for reason, modules in reasons.items()
    ]
    fitting = [scheme for scheme in chosen if scheme.name not in refused]
    if refused and all(not scheme.bits for scheme in fitting):
        raise UsageError("; ".join(notes), "Name another method.")
    return fitting, notes


def _context(skeleton: Skeleton) -> int | None:
    return getattr(skeleton.model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def _measured(
    skeletons: Sequence[Skeleton],
    labels: Sequence[str],
    of_head: Choice | None,
    adapter: Adapter | None,
    corpus: Corpus,
    advance: Advance,
) -> list[Row]:
    """The model, after its base where there is one, by their `labels`. `of_head` is what the model's head is quantized by."""

    def read(windows: Sequence[Window], before: int) -> tuple[Contender | None, list[Contender]]:
        found = [Contender(name, Reading(s, windows, advance), before=before) for name, s in zip(labels, skeletons)]
        return found[0] if len(found) > 1 else None, found[-1:]

    scores = score_all(runs(skeletons, corpus.windows), read)
    of_base = scores[0] if len(scores) > 1 else None
    rows = []
    for name, skeleton, scored in zip(labels, skeletons, scores):
        source, linears = skeleton.source, quantizable(skeleton)
        size = sum(info.nbytes for info in source.tensors.values())
        if adapter is not None and adapter_bytes(skeleton.model):
            size += adapter.nbytes
        if skeleton is skeletons[-1] and of_head is not None:
            size += _saved_by_head(skeleton, of_head)
        bits = 8 * _linear_bytes(source, linears) / sum(x.out_features * x.in_features for x in linears)
        rows.append(_row(name, scored, of_base, corpus, size, bits))
    return rows


def _saved_by_head(skeleton: Skeleton, choice: Choice) -> int:
    """What a quantized head changes in the bytes of a checkpoint: a number below zero."""
    linear = skeleton.output_head.linear
    stored = skeleton.source.tensors[linear.tensor]
    weight = Weight(linear.tensor, linear.out_features, linear.in_features, stored.dtype)
    return formats.stored_bytes(made(choice).scheme, weight) - stored.nbytes


def _simulated(
    skeleton: Skeleton,
    wanted: Sequence[Scheme],
    corpus: Corpus,
    advance: Advance,
    forms: Mapping[str, Method],
    texts: Sequence[Window],
) -> list[Row]:
    """The unquantized model, and every method compared with it. `forms` are calibrated on `texts`."""
    names = [scheme.name for scheme in wanted]

    def run(observer: Methods, advance: Advance, alone: bool) -> list[TokenScores]:
        def read(windows: Sequence[Window], before: int) -> tuple[Contender, list[Contender]]:
            # Not padded: "the tensor" of a method is then a whole sequence and nothing else.
            reading = Reading(
                skeleton, windows, advance, variants=names, observer=observer, padded=False, alone=alone, leading=texts
            )
            found = [Contender(f"{skeleton.source.label}, {name}", reading, name, before) for name in names]
            return found[0], found[1:]

        return score_all(runs([skeleton], corpus.windows, len(names)), read)

    made_anew = partial(CalibratedMethods, forms=forms, windows=texts) if forms else Methods
    observer = made_anew(skeleton, wanted)
    try:
        of_base, *others = run(observer, advance, alone=observer.of_experts)
    except SequencesMixed:
        observer = made_anew(skeleton, wanted)
        of_base, *others = run(observer, lambda count, name: None, alone=True)  # a part of the work was shown already
    whole = sum(info.nbytes for info in skeleton.source.tensors.values())
    rest = whole - _linear_bytes(skeleton.source, observer.linears)
    count = sum(x.out_features * x.in_features for x in observer.linears)
    rows = []
    for scheme, scored in zip(wanted, [of_base, *others]):
        rounding = observer.roundings[scheme.name]
        size = sum(_stored_bytes(scheme, x, skeleton.source, rounding) for x in observer.linears)
        row = _row(scheme.name, scored, of_base, corpus, rest + size, 8 * size / count)
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
