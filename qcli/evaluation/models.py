"""The models and the simulated methods that one call of `evaluate` measures, and their scores on windows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from qcli import formats
from qcli.errors import UsageError, one_of, together
from qcli.evaluation import calibrated
from qcli.evaluation.calibrated import CalibratedMethods
from qcli.evaluation.int8_cache import round_cache
from qcli.evaluation.methods import Methods, Rounding, SequencesMixed, quantizable
from qcli.evaluation.score import Contender, score_all
from qcli.evaluation.tokens import TokenScores
from qcli.evaluation.vocabularies import check_same_tokens
from qcli.loading.adapter import Adapter, open_adapter
from qcli.loading.attach import attach
from qcli.methods._method import Method
from qcli.methods.choosing import head_choice
from qcli.progress import Advance
from qcli.recipe import KEEP, Choice
from qcli.schemes import Scheme
from qcli.streaming.corpus import Window
from qcli.streaming.reading import Reading, runs
from qcli.streaming.skeleton import Skeleton


@dataclass
class Models:
    """`skeletons` are the model, after its base where there is one, by their `labels`. With `chosen` schemes it is compared with
    itself under each; those in `forms`, by name, are calibrated. `of_head` quantizes the model's head, `adapter` is what it runs
    with, and `calls` counts the calls of an int8 cache, where there is one."""

    skeletons: list[Skeleton]
    labels: list[str]
    chosen: list[Scheme]
    forms: dict[str, Method]
    of_head: Choice | None
    adapter: Adapter | None
    calls: dict[str, int] | None
    notes: list[str] = field(default_factory=list)

    @property
    def skeleton(self) -> Skeleton:
        """The model itself."""
        return self.skeletons[-1]

    @property
    def base(self) -> Skeleton | None:
        """What it is compared with; None without one."""
        return self.skeletons[0] if len(self.skeletons) > 1 else None

    def work(self, windows: Sequence[Window]) -> int:
        """The bytes that the calls of `advance` in `score` add up to."""
        return sum(Reading.work(s) for s in self.skeletons) * len(runs(self.skeletons, windows, max(len(self.chosen), 1)))


@dataclass
class Scored:
    """The scores of windows: of the base first, where there is one, or of the unquantized model. `roundings` says by name what
    simulated methods did, and `calls` how often an int8 cache was met."""

    scores: list[TokenScores]
    roundings: dict[str, Rounding] = field(default_factory=dict)
    calls: int = 0


def prepare(
    model: str,
    *,
    against: str | None,
    adapter: str | None,
    methods: str | Iterable[str] | None,
    kv_dtype: str | None,
    head: int | None,
    speed: bool,
    dtype: str,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
) -> Models:
    """The models that the options of `evaluate` name. Raises what it raises."""
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
    label, calls = skeleton.source.label, None
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
        calls = round_cache(skeleton.model)
        label = f"{label}, int8 cache"
    if of_head is not None:
        label = f"{label}, head in {of_head.method}"
    if base is not None:
        check_same_tokens(skeleton, base)
    chosen, notes = _fitting(chosen, skeleton)
    forms = {scheme.name: forms[scheme.name] for scheme in chosen if scheme.name in forms}
    skeletons = [s for s in (base, skeleton) if s is not None]
    return Models(skeletons, [of_base, label][-len(skeletons) :], chosen, forms, of_head, adapted, calls, notes)


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


def score(models: Models, windows: Sequence[Window], texts: Sequence[Window], advance: Advance) -> Scored:
    """The scores of `windows`. Calibrated forms are rounded by `texts`. Raises NonFiniteError where logits are not finite."""
    if models.chosen:
        return _simulated(models, windows, texts, advance)

    def read(some: Sequence[Window], before: int) -> tuple[Contender | None, list[Contender]]:
        named = zip(models.labels, models.skeletons)
        found = [Contender(name, Reading(s, some, advance), before=before) for name, s in named]
        return found[0] if len(found) > 1 else None, found[-1:]

    scores = score_all(runs(models.skeletons, windows), read)
    return Scored(scores, calls=models.calls["calls"] if models.calls else 0)


def _simulated(models: Models, windows: Sequence[Window], texts: Sequence[Window], advance: Advance) -> Scored:
    skeleton, names = models.skeleton, [scheme.name for scheme in models.chosen]

    def run(observer: Methods, advance: Advance, alone: bool) -> list[TokenScores]:
        def read(some: Sequence[Window], before: int) -> tuple[Contender, list[Contender]]:
            # Not padded: "the tensor" of a method is then a whole sequence and nothing else.
            options: dict[str, Any] = {"variants": names, "observer": observer, "padded": False, "alone": alone}
            reading = Reading(skeleton, some, advance, **options, leading=texts)
            found = [Contender(f"{skeleton.source.label}, {name}", reading, name, before) for name in names]
            return found[0], found[1:]

        return score_all(runs([skeleton], windows, len(names)), read)

    made_anew = partial(CalibratedMethods, forms=models.forms, windows=texts) if models.forms else Methods
    observer = made_anew(skeleton, models.chosen)
    try:
        scores = run(observer, advance, alone=observer.of_experts)
    except SequencesMixed:
        observer = made_anew(skeleton, models.chosen)
        scores = run(observer, lambda count, name: None, alone=True)  # a part of the work was shown already
    return Scored(scores, observer.roundings)
