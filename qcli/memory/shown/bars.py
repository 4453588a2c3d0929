"""An estimate as stacked bars. The terminal and the figure both draw them."""

from dataclasses import dataclass

from qcli.memory.components import Setting
from qcli.memory.estimate import Estimate, MethodEstimate
from qcli.memory.placing.verdict import NO, Load

_INFERENCE = ("weights", "cache and state", "activations", "overhead")
_TRAINING = ("weights", "training state", "activations", "overhead")  # adapters, optimizer, casts, checkpoints of activations


@dataclass(frozen=True)
class Bar:
    """What is stacked on one GPU: bytes of each of `parts_of`, the overhead at its most. `memory` is None without a GPU."""

    label: str
    parts: dict[str, int]
    memory: int | None

    @property
    def used(self) -> int:
        return sum(self.parts.values())


def parts_of(setting: Setting) -> tuple[str, ...]:
    """The names of a bar's parts, in order."""
    return _TRAINING if setting.train else _INFERENCE


def bars(found: Estimate) -> list[Bar]:
    """With one GPU or none, a bar for each method. With several, a bar for each GPU under each method that fits. Where none fits,
    only the method that needs least is shown."""
    names = parts_of(found.setting)
    if not found.gpus:
        return [_whole(row, names) for row in found.methods]
    if len(found.gpus) == 1:
        return [_on(row.method, row.placement.loads[0], names) for row in found.methods]
    shown = [row for row in found.methods if row.placement.verdict != NO]
    shown = shown or [min(found.methods, key=lambda row: row.needs.most)]
    return [_on(f"{row.method} GPU {i}", load, names) for row in shown for i, load in enumerate(row.placement.loads)]


def _whole(row: MethodEstimate, names: tuple[str, ...]) -> Bar:
    needs = row.needs
    sizes = (needs.weights, needs.state, needs.activations, needs.overhead[-1])
    return Bar(row.method, dict(zip(names, sizes)), None)


def _on(label: str, load: Load, names: tuple[str, ...]) -> Bar:
    sizes = (load.weights, load.state, load.activations, load.overhead[-1])
    return Bar(label, dict(zip(names, sizes)), load.gpu.memory)
