"""An estimate as stacked bars, for the terminal and for a figure alike."""

from dataclasses import dataclass

from qcli.memory.estimate import Estimate, MethodEstimate
from qcli.memory.verdict import NO

PARTS = ("weights", "cache and state", "activations", "overhead")


@dataclass(frozen=True)
class Bar:
    """What is stacked on one GPU: bytes of each of PARTS, the overhead at its most. `memory` is None where no GPU was named."""

    label: str
    parts: dict[str, int]
    memory: int | None

    @property
    def used(self) -> int:
        return sum(self.parts.values())


def bars(found: Estimate) -> list[Bar]:
    """A bar for each method where there is one GPU or none; on several, a bar for each GPU under each method that fits, or under
    the smallest where none does."""
    if not found.gpus:
        return [_whole(row) for row in found.methods]
    if len(found.gpus) == 1:
        return [_on(row.method, row.placement.loads[0]) for row in found.methods]
    shown = [row for row in found.methods if row.placement.verdict != NO]
    shown = shown or [min(found.methods, key=lambda row: row.needs.most)]
    return [_on(f"{row.method} GPU {i}", load) for row in shown for i, load in enumerate(row.placement.loads)]


def _whole(row: MethodEstimate) -> Bar:
    needs = row.needs
    sizes = (needs.weights, needs.state, needs.activations, needs.overhead[-1])
    return Bar(row.method, dict(zip(PARTS, sizes)), None)


def _on(label: str, load) -> Bar:
    sizes = (load.weights, load.state, load.activations, load.overhead[-1])
    return Bar(label, dict(zip(PARTS, sizes)), load.gpu.memory)
