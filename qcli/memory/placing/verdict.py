"""Whether a model fits the GPUs, what is left on each, and what would fit where it does not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qcli.memory.placing import split
from qcli.memory.placing.hardware import Gpu
from qcli.memory.placing.split import CPU, Block

FITS, TIGHT, NO = "fits", "tight", "does not fit"


@dataclass(frozen=True)
class Needs:
    """What a model needs, in bytes. `blocks` have the weights, and what each layer holds besides. On top of its blocks every GPU
    needs `activations` (their peak, and all else that is transient) and `overhead` (least, likely, most)."""

    blocks: list[Block]
    activations: int
    overhead: tuple[int, int, int]

    @property
    def weights(self) -> int:
        return sum(block.weights for block in self.blocks)

    @property
    def state(self) -> int:
        return sum(block.state for block in self.blocks)

    @property
    def least(self) -> int:
        """All of it on one GPU, with the least overhead."""
        return self.weights + self.state + self.activations + self.overhead[0]

    @property
    def likely(self) -> int:
        """All of it on one GPU, with the likely overhead."""
        return self.weights + self.state + self.activations + self.overhead[1]

    @property
    def most(self) -> int:
        """All of it on one GPU, with the most overhead."""
        return self.weights + self.state + self.activations + self.overhead[-1]

    @property
    def totals(self) -> dict[str, int]:
        """The three totals by name, for JSON."""
        return {"least": self.least, "likely": self.likely, "most": self.most}


@dataclass(frozen=True)
class Load:
    """What one GPU holds, in bytes; `holds` names its blocks."""

    gpu: Gpu
    holds: str
    weights: int
    state: int
    activations: int
    overhead: tuple[int, int, int]

    @property
    def left(self) -> int:
        """What is left on the GPU with the most overhead. It is negative where that much is missing."""
        return self.gpu.memory - self.weights - self.state - self.activations - self.overhead[-1]


@dataclass(frozen=True)
class Placement:
    """The verdict and the load of each GPU. `automatic`: the runtime makes this split without being asked, or there is one GPU.
    `on_cpu` is bytes of the blocks that did not fit."""

    verdict: str
    loads: list[Load]
    automatic: bool
    on_cpu: int = 0

    @property
    def left(self) -> int:
        """What is left on the fullest GPU with the most overhead. It is negative where that much is missing."""
        if self.on_cpu:
            return -self.on_cpu - sum(max(0, -load.left) for load in self.loads)
        return min(load.left for load in self.loads)


def place(needs: Needs, gpus: Sequence[Gpu], automatic: Sequence[int] | None) -> Placement:
    """The split of a model over GPUs: `automatic`, the one that the runtime makes, if it fits, else another that does.

    "fits" holds with the most overhead, "tight" only with the least. A model that does not fit fills the GPUs in turn, and the rest
    is left over.
    """
    if len(gpus) == 1:
        return _on_one(needs, gpus[0])
    memory = [gpu.memory for gpu in gpus]
    for verdict, overhead in ((FITS, needs.overhead[-1]), (TIGHT, needs.overhead[0])):
        rooms = [max(0, size - needs.activations - overhead) for size in memory]
        if automatic and _holds(needs.blocks, automatic, rooms):
            return _placement(verdict, needs, gpus, automatic, automatic=True)
        places = split.even(needs.blocks, rooms)
        if CPU not in places:
            return _placement(verdict, needs, gpus, places, automatic=False)
    return _placement(NO, needs, gpus, split.fill(needs.blocks, _rooms(needs, gpus)), automatic=False)


def fits(needs: Needs, gpus: Sequence[Gpu]) -> bool:
    """Whether some split fits, with the most overhead."""
    if len(gpus) == 1:
        return needs.most <= gpus[0].memory
    return CPU not in split.fill(needs.blocks, _rooms(needs, gpus))


def offload(needs: Needs, gpus: Sequence[Gpu]) -> int | None:
    """Bytes of the weights that are left for the CPU's memory when the GPUs are filled in turn. None where not one layer stays.

    Layers on the CPU are brought to GPU 0 one at a time and run there. GPU 0 therefore keeps room for the largest block, and holds
    the state of all those layers.
    """
    rooms = _rooms(needs, gpus)
    rooms[0] -= max(block.weights for block in needs.blocks)
    moved = 0
    while rooms[0] > moved:
        places = split.fill(needs.blocks, [rooms[0] - moved, *rooms[1:]])
        away = [block for block, place in zip(needs.blocks, places) if place == CPU]
        state = sum(block.state for block in away)
        if state <= moved:
            here = len(needs.blocks) - len(away)
            return sum(block.weights for block in away) if here > 1 else None
        moved = state
    return None


def count_that_fits(needs: Callable[[Sequence[Gpu]], Needs], gpu: Gpu) -> int | None:
    """How many GPUs like `gpu` are enough. `needs` gives what the model needs on a list of GPUs. None where no number is enough,
    because a single block exceeds one GPU."""
    for count in range(1, len(needs([gpu]).blocks) + 1):
        if fits(needs([gpu] * count), [gpu] * count):
            return count
    return None


def _rooms(needs: Needs, gpus: Sequence[Gpu]) -> list[int]:
    return [max(0, gpu.memory - needs.activations - needs.overhead[-1]) for gpu in gpus]


def _holds(blocks: Sequence[Block], places: Sequence[int], rooms: Sequence[int]) -> bool:
    if CPU in places:
        return False
    return all(sum(load) <= room for load, room in zip(split.loads(blocks, places, len(rooms)), rooms))


def _on_one(needs: Needs, gpu: Gpu) -> Placement:
    verdict = FITS if needs.most <= gpu.memory else TIGHT if needs.least <= gpu.memory else NO
    return _placement(verdict, needs, [gpu], [0] * len(needs.blocks), automatic=True)


def _placement(verdict: str, needs: Needs, gpus: Sequence[Gpu], places: Sequence[int], automatic: bool) -> Placement:
    found = []
    for i, (gpu, (weights, state)) in enumerate(zip(gpus, split.loads(needs.blocks, places, len(gpus)))):
        idle = CPU not in places and i not in places  # where blocks are left over, no GPU is idle: each has too little room
        passing, overhead = (0, (0, 0, 0)) if idle else (needs.activations, needs.overhead)
        found.append(Load(gpu, split.ranges(needs.blocks, places, i), weights, state, passing, overhead))
    left_over = sum(block.weights + block.state for block, place in zip(needs.blocks, places) if place == CPU)
    return Placement(verdict, found, automatic, left_over)
