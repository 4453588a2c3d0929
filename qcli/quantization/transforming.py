"""Methods that divide the inputs of modules by factors: what is decided for a block before its weights are rounded, and the norms
and biases that take the division up, which are written here and not carried over.

A norm's gain w / s is stored in the output's dtype. The weights are multiplied by what it came to be, w over the stored value, so
that no rounding of s is left in the product. Nothing is decided by chance or by what is already written: after a stop, a block in
which a weight is left gets the same factors again. A folded norm is journalled before any weight that needs it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from qcli.calibration.folding import Fold, Folding
from qcli.calibration.gather import Crew, Gathered
from qcli.calibration.rounding import Changed
from qcli.calibration.statistics import Statistics
from qcli.checkpoint import dtypes
from qcli.methods._factors import Factors
from qcli.methods.errors import ErrorSums
from qcli.quantization.decoding import read_tensor
from qcli.quantization.plan import Plan, Work
from qcli.quantization.rounding import read_weight
from qcli.quantization.staged import StagedWeights
from qcli.quantization.staging import Staging
from qcli.streaming.run import Pass
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit

SAMPLE_TOKENS = 512  # over which the error of a product with rounded activations is measured


def changes_inputs(work: Work) -> bool:
    """Whether the method of a work divides the inputs of its module."""
    return bool(getattr(work.method, "changes_inputs", False))


@dataclass
class Decided:
    """What happens to a block: `changed` by module; `written` has the new values of tensors that are else carried over, by the
    index of their work."""

    changed: dict[str, Changed] = field(default_factory=dict)
    written: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass
class Folded:
    """What was found so far: by each set of readers, its exponent, and the names of those whose inputs nothing can divide."""

    exponents: dict[tuple[str, ...], float] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


class Transforms:
    """Decides the factors of blocks, and puts what was written of them into the model. `found` says what was done."""

    def __init__(self, plan: Plan, staging: Staging, skeleton: Skeleton, crew: Crew):
        self.plan, self.staging, self.skeleton, self.crew = plan, staging, skeleton, crew
        self.found = Folded()
        self._staged = StagedWeights(plan, staging)
        self._carried = {w.info.name: w for w in plan.work if w.linear is None}

    def decide(self, unit: Unit, first: Pass, gathered: Gathered, works: Sequence[Work], fewest: int) -> Decided:
        """The factors of a block, from the statistics of all its modules, of which those with less than `fewest` tokens decide
        nothing. The statistics become those of the divided inputs. `first` is a pass through the block."""
        by_module = {w.linear.module: w for w in works if w.linear}
        folding = self._folding(unit, by_module, first)
        wanted = [group for group in gathered.groups if any(changes_inputs(by_module[name]) for name in group)]
        able = [
            group
            for group in wanted
            if len({by_module[name].method for name in group}) == 1 and gathered.found[group[0]].tokens >= fewest
        ]
        folds, left = next(iter(self.crew.results([lambda: folding.find(able)])))
        folds = [fold for fold in folds if self._parameters(fold) is not None]
        tasks = [lambda fold=fold: self._factors(fold, by_module, gathered.found[fold.readers[0]]) for fold in folds]
        decided = Decided()
        for fold, factors in zip(folds, list(self.crew.results(tasks))):
            self.found.exponents[fold.readers] = factors.exponent
            if factors.scale is None or (scale := self._write(fold, factors.scale, by_module, decided)) is None:
                continue
            for name in fold.readers:
                decided.changed.setdefault(name, Changed()).columns = scale
            gathered.found[fold.readers[0]].divide(scale)
        folded = {fold.readers for fold in folds}
        self.found.left += [name for group in wanted if group not in folded for name in group]
        return decided

    def write(self, decided: Decided) -> None:
        """Writes the folded tensors, and notes them in the journal."""
        for index, values in decided.written.items():
            work = self.plan.work[index]
            (output,) = work.outputs
            self.staging.write(output.file, output.start, values.cpu().contiguous().view(torch.uint8).numpy().data)
            if index not in self.staging.done:
                self.staging.finish_work(index, ErrorSums())

    def replace(self, unit: Unit) -> int:
        """Puts the folded tensors of a block, which the journal names, in the place of the block's own."""
        return put_carried(unit, self.skeleton, self._carried, self._staged, lambda work: work.index in self.staging.done)

    def _folding(self, unit: Unit, by_module: dict[str, Work], first: Pass) -> Folding:
        modules = {f"{unit.name}.{path}": module for path, module in unit.module.named_modules() if path}
        transposed = {name for name, work in by_module.items() if work.linear and work.linear.transposed}
        return Folding(unit.name, modules, [name for name in modules if name in by_module], transposed, first.run)

    def _factors(self, fold: Fold, by_module: dict[str, Work], statistics: Statistics) -> Factors:
        works = [by_module[name] for name in fold.readers]
        weights = [read_weight(self.plan, work).to(self.skeleton.device) for work in works]
        found: Factors = cast(Any, works[0].method).factors(statistics.inputs, weights)
        return found

    def _parameters(self, fold: Fold) -> dict[str, Work] | None:
        """The tensors of the checkpoint, by name in the producer, that take a fold up beside a weight that is rounded; None where
        they are not single tensors that the output holds as they are in the model."""
        found = {}
        for name in ("weight", "bias") if fold.first is None else ("bias",):
            parameter = getattr(self.skeleton.model.get_submodule(fold.producer), name, None)
            if not isinstance(parameter, torch.Tensor):
                continue
            origin = self.skeleton.origin(f"{fold.producer}.{name}")
            work = self._carried.get(origin[0].name) if len(origin) == 1 else None
            if work is None or work.info.dtype not in dtypes.FLOATS:
                return None
            stored = read_tensor(self.plan.source, work.info).to(parameter)
            if not torch.equal(stored, parameter):
                return None
            found[name] = work
        return found

    def _write(self, fold: Fold, scale: torch.Tensor, by_module: dict[str, Work], decided: Decided) -> torch.Tensor | None:
        """Notes what a fold changes at its producer. The factors as they came to be, float32; None where the output's dtype cannot
        hold the result."""
        parameters = self._parameters(fold) or {}
        values = {name: read_tensor(self.plan.source, work.info).float().to(scale.device) for name, work in parameters.items()}
        dtype = {name: dtypes.torch_dtype(work.outputs[0].dtype) for name, work in parameters.items()}
        made: dict[str, torch.Tensor] = {}
        if fold.first is None:
            gain = values["weight"] + fold.unit
            made["weight"] = (gain / scale - fold.unit).to(dtype["weight"])
            scale = _as_stored(gain, made["weight"].float() + fold.unit, scale)
            rows = scale
        else:
            rows = torch.ones(by_module[fold.producer].linear.out_features, device=scale.device)  # type: ignore[union-attr]
            rows[fold.first :] = scale
        if "bias" in parameters:
            made["bias"] = (values["bias"] / rows).to(dtype["bias"])
        if not all(tensor.isfinite().all() for tensor in made.values()):
            return None
        if fold.first is not None:
            decided.changed.setdefault(fold.producer, Changed()).rows = 1 / rows
        decided.written |= {parameters[name].index: tensor for name, tensor in made.items()}
        return scale


def put_carried(
    unit: Unit, skeleton: Skeleton, carried: dict[str, Work], staged: StagedWeights, wanted: Callable[[Work], bool]
) -> int:
    """Puts vectors of a block as they stand in the output into the model, if they are `wanted`; their number."""
    count = 0
    for name, module, attribute in unit.weights():
        parameter, origin = getattr(module, attribute), skeleton.origin(name)
        work = carried.get(origin[0].name) if len(origin) == 1 else None
        if work is not None and parameter.dim() == 1 and wanted(work):
            parameter.data = staged.carried(work).to(parameter)
            count += 1
    return count


def _as_stored(gain: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The factors by which a gain was divided, where the stored one says so; else `scale`."""
    found = gain / stored
    return torch.where(found.isfinite() & (found > scale / 2) & (found < scale * 2), found, scale)
