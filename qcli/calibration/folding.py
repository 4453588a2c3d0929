"""Where the factors of an input can be folded: which module makes what a set of linear modules reads.

An input is divided by s [in_features] if what makes it is: the gain (and bias) of a norm, or rows of a linear module, as of up_proj
before down_proj, and of v_proj before o_proj. The weights that read it are multiplied by s. Nothing here knows an architecture:
  norms    the module whose output is the very tensor that is read, with a gain w for each channel; its output is w n or (1 + w) n
  rows     a linear module beside the readers with enough rows, of which the last ones are tried, the nearest module first
What is found is then tried: with factors that are powers of two, at random, readers and block must give the outputs that they gave
before. So modules that another reader would miss, and architectures that do otherwise, are left alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_SAME = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative errors of the same values; of 16 bits:
_SAME_16 = 0.02
_MOST_TRIALS = 3  # of linear modules for one input


@dataclass(frozen=True)
class Fold:
    """`readers` read what `producer` makes, full names both. `unit` is 1 where a norm's gain is 1 + weight. For a linear producer
    `first` is the first row that makes the input, for a norm None."""

    readers: tuple[str, ...]
    producer: str
    unit: float = 0.0
    first: int | None = None


@dataclass
class Seen:
    """What modules read and made in one pass of a block. Tensors are held, so that no two share memory by chance."""

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    result: torch.Tensor | None = None


class Folding:
    """Finds the folds of a block. `linears` are the linear modules that may be changed, by full name; those of `transposed` are
    Conv1D. `run` passes a batch through the block and returns what it gives."""

    def __init__(self, block: str, modules: Mapping[str, nn.Module], linears: Sequence[str], transposed: set[str], run: Callable):
        self.block, self.modules, self.linears, self.transposed, self._run = block, modules, linears, transposed, run

    def find(self, groups: Sequence[tuple[str, ...]]) -> tuple[list[Fold], list[tuple[str, ...]]]:
        """The folds of groups of readers, and the groups that have none."""
        seen = self._see([name for name, module in self.modules.items() if not any(True for _ in module.children())])
        once = [group for group in groups if all(seen.calls.get(name) == 1 for name in group)]
        waiting = {group: self._candidates(group, seen) for group in once}
        found: list[Fold] = []
        while waiting:
            tried = {group: fold for group, folds in waiting.items() if (fold := next(folds, None)) is not None}
            good = set(self._good(list(tried.values()), seen))
            for fold in tried.values():
                if fold in good and all(fold.producer != other.producer for other in found):
                    found.append(fold)
            waiting = {group: waiting[group] for group, fold in tried.items() if fold not in good}
        found.sort(key=lambda fold: groups.index(fold.readers))
        folded = {fold.readers for fold in found}
        return found, [group for group in groups if group not in folded]

    def _good(self, folds: Sequence[Fold], seen: Seen) -> list[Fold]:
        """Those that change no output, tried all at once, and where that fails by halves."""
        if not folds or self._changes_nothing(folds, seen):
            return list(folds)
        if len(folds) == 1:
            return []
        half = len(folds) // 2
        return self._good(folds[:half], seen) + self._good(folds[half:], seen)

    def _changes_nothing(self, folds: Sequence[Fold], seen: Seen) -> bool:
        readers = [name for fold in folds for name in fold.readers]
        with self.kept():
            for number, fold in enumerate(folds):
                self.apply(fold, _powers_of_two(seen.inputs[fold.readers[0]], number))
            now = self._see(readers)
        # A reader whose own rows were divided gives another output.
        divided = {fold.producer for fold in folds}
        pairs = [(now.outputs[name], seen.outputs[name]) for name in readers if name not in divided]
        assert now.result is not None and seen.result is not None
        return all(_same(a, b) for a, b in [*pairs, (now.result, seen.result)])

    def _candidates(self, group: tuple[str, ...], seen: Seen) -> Iterator[Fold]:
        x = seen.inputs[group[0]]
        for name, output in seen.outputs.items():
            if name not in self.linears and output.data_ptr() == x.data_ptr() and output.numel() == x.numel():
                if (unit := self._gain(name, seen)) is not None:
                    yield Fold(group, name, unit)
                    return
        parents = {name.rpartition(".")[0] for name in group}
        order = list(self.modules)
        beside = [
            name
            for name in self.linears
            if {name.rpartition(".")[0]} == parents
            and order.index(name) < order.index(group[0])
            and self._weight(name).shape[0] >= x.shape[-1]
        ]
        for name in beside[: -_MOST_TRIALS - 1 : -1]:
            yield Fold(group, name, first=self._weight(name).shape[0] - x.shape[-1])

    def _gain(self, name: str, seen: Seen) -> float | None:
        """What stands beside the gain of a norm: 0 or 1; None where neither explains its output."""
        module, output = self.modules[name], seen.outputs[name]
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.shape != output.shape[-1:] or name not in seen.inputs:
            return None
        scale = _powers_of_two(output, 0)
        for unit in (0.0, 1.0):
            with self.kept():
                self.apply(Fold((), name, unit), scale)
                if _same(module(seen.inputs[name]).float() * scale, output.float(), output.dtype):
                    return unit
        return None

    def _weight(self, name: str) -> torch.Tensor:
        """[out_features, in_features]"""
        weight = self.modules[name].weight
        assert isinstance(weight, torch.Tensor)
        return weight.t() if name in self.transposed else weight

    def apply(self, fold: Fold, scale: torch.Tensor) -> None:
        """Divides what the fold's producer makes by scale float32 [in_features], and multiplies what its readers hold by it."""
        for name in fold.readers:
            module = self.modules[name]
            module.weight.data = self._oriented(name, self._weight(name) * scale)  # type: ignore[operator]
        module = self.modules[fold.producer]
        bias = getattr(module, "bias", None)
        bias = bias if isinstance(bias, torch.Tensor) else None
        if fold.first is None:
            weight: Any = module.weight
            module.weight.data = ((weight.float() + fold.unit) / scale - fold.unit).to(weight.dtype)
            if bias is not None:
                bias.data = (bias.float() / scale).to(bias.dtype)
            return
        rows = torch.ones(len(self._weight(fold.producer)), device=scale.device)
        rows[fold.first :] = scale
        module.weight.data = self._oriented(fold.producer, self._weight(fold.producer) / rows.unsqueeze(1))
        if bias is not None:
            bias.data = (bias.float() / rows).to(bias.dtype)

    def _oriented(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        held: Any = self.modules[name].weight
        return (weight.t() if name in self.transposed else weight).to(held.dtype).contiguous()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Afterwards every parameter is what it was."""
        before = [(p, p.data) for module in self.modules.values() for p in module.parameters(recurse=False)]
        try:
            yield
        finally:
            for parameter, data in before:
                parameter.data = data

    def _see(self, names: Sequence[str]) -> Seen:
        """What these modules read and made in a pass."""
        seen, handles = Seen(), []

        def hook(name: str) -> Callable:
            def see(module, args, output):
                seen.calls[name] = seen.calls.get(name, 0) + 1
                if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                    seen.inputs[name], seen.outputs[name] = args[0], output

            return see

        try:
            for name in names:
                handles.append(self.modules[name].register_forward_hook(hook(name)))
            output = self._run()
        finally:
            for handle in handles:
                handle.remove()
        seen.result = output[0] if isinstance(output, tuple) else output
        return seen


def _powers_of_two(like: torch.Tensor, seed: int) -> torch.Tensor:
    """float32 [like.shape[-1]] of 1/2, 1, 2 and 4, by which products are divided without any rounding."""
    exponents = torch.randint(-1, 3, like.shape[-1:], generator=torch.Generator().manual_seed(seed))
    return torch.exp2(exponents.float()).to(like.device)


def _same(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a is b [..., columns] but for rounding, in each column."""
    most = _SAME.get(dtype or a.dtype, _SAME_16)
    a, b = a.float().flatten(0, -2), b.float().flatten(0, -2)
    error, norm = (a - b).square().sum(0), b.square().sum(0)
    floor = norm.mean() * 1e-6  # of columns that are zero but for rounding
    return bool((error <= most**2 * (norm + floor)).all())
