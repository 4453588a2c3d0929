"""What a calibrated run does beside `execute`: it opens the model and the texts, rounds by them, and measures the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from qcli.calibration.settings import CHECK_SHARE, CHECK_TOKENS, Calibration
from qcli.cluster.pool import Pool
from qcli.devices import pick_device
from qcli.errors import together
from qcli.evaluation.score import Contender, score_all
from qcli.evaluation.statistics import mean, perplexity
from qcli.methods._gptq import nearest
from qcli.methods.choosing import needs_of
from qcli.methods.simulate import Simulated, simulate, simulated, with_fixed_columns
from qcli.progress import Advance
from qcli.quantization.absmax import AbsmaxReader
from qcli.quantization.by_gradients import round_by_gradients
from qcli.quantization.calibrating import Calibrated, calibrate
from qcli.quantization.calibration_report import CalibrationReport, Checked, KindError
from qcli.quantization.decoding import decode
from qcli.quantization.gradient_needs import default_tokens
from qcli.quantization.plan import Plan, Work
from qcli.quantization.rounding import read_weight
from qcli.quantization.staged import StagedWeights
from qcli.quantization.staging import Staging
from qcli.quantization.transforming import put_carried
from qcli.runtime import cpu
from qcli.streaming.corpus import Corpus, Window, read_windows
from qcli.streaming.reading import Reading, runs
from qcli.streaming.run import Observer
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

_SOURCE, _RESULT, _PLAIN = "source", "result", "plain"


class CalibrationRun:
    """Opens the model of a plan and its texts. Raises UsageError for texts that do not do, and what Skeleton raises."""

    def __init__(self, plan: Plan, device: str, staging: Staging, pool: Pool | None = None):
        assert plan.calibration is not None
        self.plan, self.staging, self.pool, settings = plan, staging, pool, plan.calibration
        source = plan.source
        options: dict[str, Any] = {"revision": source.revision} if source.is_hub else {}
        self.skeleton = Skeleton(
            source.label, dtype=_dtype(plan, device), device=device, trust_remote_code=source.trusted, **options
        )
        self.corpus = read_corpus(self.skeleton, settings, default_tokens(plan))
        self.used, self.held_out = split(self.corpus.windows, settings.check)

    def round(self, advance: Advance) -> CalibrationReport:
        """Rounds what the texts decide and writes it."""
        done = round_by_gradients(self.plan, self.staging, self.skeleton, self.used, advance)
        done = calibrate(self.plan, self.staging, self.skeleton, self.used, advance, done, self.pool)
        report = CalibrationReport(
            self.corpus.name,
            done.tokens,
            self.corpus.sequence_length,
            sum(len(window.ids) for window in self.held_out),
            len(self.plan.calibrated),
            _kinds(done),
            done.seconds,
        )
        if done.folded.left:
            what = "modules are not transformed, since nothing before them can divide their inputs"
            report.notes.append(together(what, done.folded.left))
        if routed := [each.tokens for each in done.roundings.values() if 0 < each.tokens < done.tokens]:
            least, most = min(routed), max(routed)
            report.notes.append(f"{len(routed):,} modules, as of experts, were reached by {least:,} to {most:,} tokens each")
        if done.unseen:
            names = [f"{name} ({count:,})" for name, count in sorted(done.unseen.items())]
            report.notes.append(together("modules that too few tokens reached are rounded without texts", names))
        dead = {name: each.dead for name, each in done.roundings.items() if each.dead}
        if dead:
            report.notes.append(together("modules have input channels that no token reached: nearest there", sorted(dead)))
        if damped := sorted(n for n, each in done.roundings.items() if each.damping and each.damping > _asked(self.plan, n)):
            report.notes.append(together("modules needed more damping than was asked for", damped))
        return report

    def check(self) -> Checked | None:
        """Measures the staged result against the source, on the windows that no weight was rounded by; None without any."""
        if not self.held_out:
            return None
        observer = _Swapped(self.plan, self.staging, self.skeleton)
        names = (_SOURCE, _RESULT, _PLAIN)

        def read(windows: Sequence[Window], before: int) -> tuple[Contender, list[Contender]]:
            alone = observer.rounds_sequences
            reading = Reading(self.skeleton, windows, lambda count, name: None, variants=names, observer=observer, alone=alone)
            found = [Contender(f"{self.skeleton.source.label}, {name}", reading, name, before) for name in names]
            return found[0], found[1:]

        base, result, plain = score_all(runs([self.skeleton], self.held_out, len(names)), read)
        size = sum(window.scored_bytes for window in self.held_out)
        with_texts, without = result.divergence, plain.divergence
        assert with_texts is not None and without is not None
        ours, theirs = mean(with_texts), mean(without)
        return Checked(
            len(base.loss),
            perplexity(base.loss, size).perplexity.value,
            perplexity(result.loss, size).perplexity.value,
            ours.value,
            ours.error,
            theirs.value,
            theirs.error,
            mean(with_texts - without).error,
        )


def _dtype(plan: Plan, device: str) -> str:
    """float32, unless the device multiplies in the model's 16 bits."""
    fast = pick_device(device).type == "cuda" or (plan.dtype == "BF16" and cpu.native_bfloat16())
    return "auto" if fast else "float32"


def read_corpus(skeleton: Skeleton, settings: Calibration, default_tokens: int) -> Corpus:
    """The windows of the calibration's text, of so many tokens where the settings do not say. Raises UsageError."""
    config = skeleton.model.config.get_text_config(decoder=True)
    return read_windows(
        skeleton.tokenizer,
        settings.text,
        tokens=settings.tokens,
        default_tokens=default_tokens,
        sequence_length=settings.sequence_length,
        model_limit=getattr(config, "max_position_embeddings", None),
    )


def split(windows: Sequence[Window], check: bool) -> tuple[list[Window], list[Window]]:
    """(windows to calibrate on, windows held out): of every CHECK_SHARE the last, up to CHECK_TOKENS tokens; of fewer the last one
    that is as long as any. None is held out of a single window."""
    if not check or len(windows) < 2:
        return list(windows), []
    longest = max(len(window.ids) for window in windows)
    last = max(number for number, window in enumerate(windows, 1) if len(window.ids) == longest)
    used: list[Window] = []
    held_out: list[Window] = []
    tokens = 0
    for number, window in enumerate(windows, 1):
        if tokens < CHECK_TOKENS and (number % CHECK_SHARE == 0 or (number == last and len(windows) < CHECK_SHARE)):
            held_out.append(window)
            tokens += len(window.ids)
        else:
            used.append(window)
    return used, held_out


def _asked(plan: Plan, module: str) -> float:
    return next(float(getattr(w.method, "damping", 1.0)) for w in plan.calibrated if w.linear and w.linear.module == module)


def _kinds(done: Calibrated) -> list[KindError]:
    sums: dict[str, list[float]] = {}
    for module, each in done.roundings.items():
        if each.output_norm:
            found = sums.setdefault(module.rsplit(".", 1)[-1], [0.0, 0.0, 0.0, 0.0])
            for i, value in enumerate((1.0, each.output_error or 0.0, each.plain_error or 0.0, each.output_norm)):
                found[i] += value
    return [
        KindError(name, int(count), (ours / norm) ** 0.5, (theirs / norm) ** 0.5)
        for name, (count, ours, theirs, norm) in sums.items()
    ]


class _Swapped(Observer):
    """While the calls of a variant pass a block, its quantized modules have the weights of that variant, and round activations as
    readers of the result do; with columns that texts chose, as qcli does. With the result, other vectors of the block are those of
    the output, too.

    `rounds_sequences` says whether the activations of a whole sequence are rounded together.
    """

    def __init__(self, plan: Plan, staging: Staging, skeleton: Skeleton):
        self.plan, self.skeleton, self.model = plan, skeleton, skeleton.model
        self.staged, self.absmax = StagedWeights(plan, staging), AbsmaxReader(plan)
        self.carried = {w.info.name: w for w in plan.work if w.linear is None}
        schemes = [work.method.scheme for work in plan.quantized if work.method]
        self.rounds_sequences = any(scheme.threshold or scheme.activations == "tensor" for scheme in schemes)

    @contextmanager
    def variant(self, unit: Unit, name: str) -> Iterator[None]:
        """See Observer."""
        before: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        rounding: list[torch.nn.Module] = []
        try:
            if name == _RESULT and unit.index is not None:
                before += [(p, p.data) for p in unit.module.parameters() if p.dim() == 1]
                put_carried(unit, self.skeleton, self.carried, self.staged, lambda work: True)
            for work in self.plan.quantized if name != _SOURCE and unit.index is not None else ():
                if work.linear and work.linear.module.startswith(f"{unit.name}."):
                    module = self.model.get_submodule(work.linear.module)
                    if work.method and needs_of(work.method) == "tokens":
                        module.forward = partial(_forward, module, self._simulated(work, name))
                        rounding.append(module)
                        continue
                    weight = self._weight(work, name)
                    if work.method and work.method.scheme.activations:
                        layer = simulated(work.method.scheme, weight.to(module.weight.device))
                        module.forward = lambda x, layer=layer, module=module: layer.linear(x, module.bias)
                        rounding.append(module)
                        continue
                    before.append((module.weight, module.weight.data))
                    weight = weight.t() if work.linear.transposed else weight
                    module.weight.data = weight.to(module.weight.data).contiguous()
            yield
        finally:
            for parameter, data in before:
                parameter.data = data
            for module in rounding:
                del module.forward

    def _simulated(self, work: Work, name: str) -> Simulated:
        method: Any = work.method
        if name == _PLAIN:
            return simulate(method.without_texts(), read_weight(self.plan, work))
        stored, tensors = self.staged.stored(work)
        columns = tensors.get("outlier_columns", torch.empty(0, dtype=torch.int32))
        return with_fixed_columns(decode(stored, tensors), columns, method.scheme.threshold)

    def _weight(self, work: Work, name: str) -> torch.Tensor:
        method: Any = work.method
        if name == _RESULT or work not in self.plan.calibrated:
            return self.staged.weight(work)
        weight = read_weight(self.plan, work)
        if needs_of(method) == "fisher":
            return simulate(method.without_texts(), weight).weight
        return nearest(weight.float(), method.without_texts().grid(weight, None, self.absmax.of(work))).values


def _forward(module: torch.nn.Module, simulated: Simulated, x: torch.Tensor) -> torch.Tensor:
    bias: Any = module.bias
    return simulated.linear(x, bias)
