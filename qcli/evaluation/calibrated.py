"""Methods as `qcli quantize --calibrate` rounds by texts, simulated inside a streamed model. Nothing is written.

Windows that no score counts pass each block before all others, unquantized. They leave statistics at the inputs of its linear
layers, by which the weights of each calibrated form are rounded when its turn comes to pass the block. They are let go with the
block, so that memory holds its statistics besides, and the hidden states of these windows. Factors that divide inputs (AWQ) are
left out.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qcli import methods as quantizers
from qcli import schemes
from qcli.calibration.gather import Gatherer
from qcli.calibration.rounding import needs_factor, simulated_by
from qcli.calibration.settings import FEWEST_TOKENS
from qcli.calibration.statistics import Statistics
from qcli.checkpoint import dtypes
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.model_dtype import model_dtype
from qcli.errors import NonFiniteError, UsageError
from qcli.evaluation.methods import Methods
from qcli.methods._method import Method
from qcli.methods.choosing import calibrated, made, needs_of
from qcli.methods.simulate import Simulated, absmax_of
from qcli.recipe import Choice
from qcli.schemes import BY_TEXTS, NAMED, Scheme
from qcli.streaming.batches import make_batches
from qcli.streaming.corpus import DEFAULT_TOKENS, Corpus, Window, read_windows
from qcli.streaming.reading import LEADING
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

MOST_TOKENS = 8192  # to calibrate on
_SUFFIX = "-calibrated"


def form_of(name: str) -> Method | None:
    """The method `name` as --calibrate makes it, without factors that divide inputs; None for a method that texts do not help, or
    turn into another."""
    choice = calibrated(Choice(name))
    if name in BY_TEXTS or choice.method != name or NAMED[name].keeps_original or not NAMED[name].bits:
        return None
    method: Any = made(choice)
    method = replace(method, transform="none") if hasattr(method, "transform") else method
    found: Method = method
    return found if needs_of(found) in ("moments", "hessian", "tokens") else None


def chosen(names: str | Iterable[str]) -> tuple[list[Scheme], dict[str, Method]]:
    """(the schemes of qcli.schemes.chosen, and those of names that end in "calibrated", each after its own; the methods of the
    latter by the names of their schemes). Raises UsageError."""
    plain, forms = [], {}
    for name in names.split(",") if isinstance(names, str) else names:
        match = re.fullmatch(r"(.*[a-z0-9])[^a-z0-9]*calibrated[^a-z0-9]*", name.strip().lower())
        if match is None:
            plain.append(name)
            continue
        own = schemes.named(match[1]).name
        if (form := form_of(own)) is None:
            able = ", ".join(f"{each}{_SUFFIX}" for each in NAMED if form_of(each))
            raise UsageError(f"{own} has no calibrated form to simulate", f"These have one: {able}.")
        forms[f"{own}{_SUFFIX}"] = form
    found = schemes.chosen(plain) + [replace(form.scheme, name=name) for name, form in forms.items()]
    order = list(NAMED)
    return sorted(found, key=lambda scheme: (order.index(scheme.name.removesuffix(_SUFFIX)), scheme.name in forms)), forms


def read_both(
    tokenizer: Any,
    text: str | Path | None,
    tokens: int | None,
    sequence_length: int | None,
    stride: int | None,
    model_limit: int | None,
) -> tuple[Corpus, Corpus]:
    """(what is scored, what is calibrated on). The latter follows the former in the text: up to MOST_TOKENS tokens after the first
    `tokens`, or without `tokens` a third of what is read. Raises UsageError where too little follows."""
    options: dict[str, Any] = {"sequence_length": sequence_length, "model_limit": model_limit}
    most = (tokens or DEFAULT_TOKENS) + MOST_TOKENS
    whole = read_windows(tokenizer, text, default_tokens=most, **options)
    scored = whole.tokens * DEFAULT_TOKENS // (DEFAULT_TOKENS + MOST_TOKENS) if tokens is None else tokens
    corpus = read_windows(tokenizer, text, tokens=scored, stride=stride, **options)
    if whole.tokens - scored < FEWEST_TOKENS:
        follow = f"{max(whole.tokens - scored, 0):,} tokens of {whole.name} follow the {scored:,} that are scored"
        raise UsageError(
            f"{follow}, and calibrated forms need {FEWEST_TOKENS:,} or more", "Score fewer --tokens, or give a longer --text."
        )
    return corpus, read_windows(tokenizer, text, default_tokens=MOST_TOKENS, passed_over=scored, **options)


def about(texts: Corpus) -> str:
    """A sentence on what calibrated forms are."""
    return (
        f"calibrated forms are rounded by the next {texts.tokens:,} tokens of {texts.name}, which are not scored, as "
        "`qcli quantize --calibrate` does it, but for AWQ's factors"
    )


class CalibratedMethods(Methods):
    """Methods, of which `forms` by name are rounded by what the variant LEADING leaves in each block. `tokens` are all of that."""

    def __init__(self, skeleton: Skeleton, methods: Sequence[Scheme], forms: Mapping[str, Method], windows: Sequence[Window]):
        super().__init__(skeleton, methods)
        self.methods |= forms
        self.skeleton, self.forms = skeleton, forms
        self.fewest = min(FEWEST_TOKENS, sum(len(window.ids) for window in windows))
        self.batches = len(make_batches([window.ids for window in windows], None))
        self.dtype = model_dtype(skeleton.source, "auto")
        self._found: dict[str, Statistics] = {}  # of the block's modules

    @contextmanager
    def variant(self, unit: Unit, name: str) -> Iterator[None]:
        """See Observer."""
        if name == LEADING:
            with self._gathering(unit):
                yield
            return
        for linear in self.linears if name in self.forms else ():
            method, statistics = self.forms[name], self._found.get(linear.module)
            if statistics is not None and needs_factor(method, statistics):
                statistics.expect_factor(method.damping)  # type: ignore[attr-defined]
        with super().variant(unit, name):
            yield

    @contextmanager
    def _gathering(self, unit: Unit) -> Iterator[None]:
        names = [linear.module for linear in self.linears if linear.module.startswith(f"{unit.name}.") and unit.index is not None]
        needs = {needs_of(method) for method in self.forms.values()}
        hessians, samples = (set(names) if wanted in needs else set() for wanted in ("hessian", "tokens"))
        modules = {name: self.model.get_submodule(name) for name in names}
        gatherer = Gatherer(modules, hessians, self.skeleton.device, 0, samples, batches=self.batches)
        count = 0
        with ExitStack() as stack:

            def next_batch(*args: object) -> None:
                nonlocal count
                stack.close()
                stack.enter_context(gatherer.batch(count))
                count += 1

            next_batch()
            handle = unit.module.register_forward_hook(next_batch)
            try:
                yield
            finally:
                handle.remove()
                gatherer.close()
        self._found = gatherer.found
        for name, statistics in self._found.items():
            if not statistics.is_finite:
                raise NonFiniteError(f"{name}: an activation that reaches it is NaN or infinite", "Try --dtype float32.")
            if statistics.hessian is not None:
                statistics.symmetric()

    def simulated(self, name: str, linear: Linear, weight: torch.Tensor) -> Simulated:
        """See Methods."""
        if name not in self.forms:
            return super().simulated(name, linear, weight)
        method, statistics = self.forms[name], self._found.get(linear.module)
        if statistics is not None and statistics.tokens < self.fewest:
            statistics = None
        stored = self.skeleton.source.tensors[linear.tensor].dtype
        entering = weight.to(dtypes.torch_dtype(quantizers.entering_dtype(method, stored, self.dtype)))
        return simulated_by(entering, method, statistics, absmax_of(entering) if method.needs_absmax else 0.0)

    def passed(self, unit: Unit) -> None:
        """See Observer."""
        self._found = {}
