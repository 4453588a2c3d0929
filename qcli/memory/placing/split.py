"""A model over several GPUs, block by block in the order of its forward pass: as transformers places it, and where it fits.

A block is an embedding, a layer, or the final norm with the head. No block is ever cut in two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STACK_PREFIX = "layer "  # of the names of the blocks that hold keys and values
CPU = -1  # the place of a block for which no GPU had room
_BUFFER = 1.25  # largest blocks that a GPU gets on top of an equal share: transformers' get_balanced_memory
_QUANTIZED_SHARE = 0.90  # transformers' bitsandbytes quantizers use only this share of each GPU


@dataclass(frozen=True)
class Block:
    """One block, in bytes.

    weights: those in memory. counted: the weights as transformers counts them for a device map, without scales. state: what the
    block keeps besides (keys and values, adapters). unquantized: a count of parameters. with_first: whether it is a head that is
    the embedding's own tensor.
    """

    name: str
    weights: int
    counted: int
    state: int = 0
    unquantized: int = 0
    with_first: bool = False


def device_map_auto(blocks: Sequence[Block], memory: Sequence[int], quantized: bool) -> list[int]:
    """The GPU of each block under device_map="auto" (transformers 5, get_balanced_memory and infer_auto_device_map).

    `memory` is what each GPU has free. Each GPU gets an equal share and a buffer of 1.25 blocks, and the GPUs are filled in order.
    GPU 0 keeps room for the largest block that is still to come. A block that no GPU takes is on the CPU.
    """
    largest = max(block.counted for block in blocks)
    limits = [float(size) for size in memory]
    share = sum(block.counted for block in blocks) // len(limits) + int(_BUFFER * largest)
    limits[:-1] = [min(share, limit) for limit in limits[:-1]]
    if quantized:
        limits = [_QUANTIZED_SHARE * limit for limit in limits]
    places: list[int] = []
    gpu, used = 0, 0
    for i, block in enumerate(blocks):
        if block.with_first:
            places.append(places[0])
            continue
        reserved = max((later.counted for later in blocks[i + 1 :]), default=0)
        while gpu < len(limits) and used + block.counted > limits[gpu] - (reserved if gpu == 0 else 0):
            gpu, used = gpu + 1, 0
        places.append(gpu if gpu < len(limits) else CPU)
        used += block.counted
    return places


def fill(blocks: Sequence[Block], rooms: Sequence[int]) -> list[int]:
    """The GPU of each block when each GPU in turn takes as many blocks as it has room for. CPU for those that are left.

    `rooms` is what weights and state may take on each GPU. If any split into runs of blocks fits, this one does.
    """
    places: list[int] = []
    gpu, left = 0, rooms[0] if rooms else 0
    for block in blocks:
        size = block.weights + block.state
        while gpu < len(rooms) and size > left:
            gpu += 1
            left = rooms[gpu] if gpu < len(rooms) else 0
        if gpu == len(rooms):
            places.append(CPU)
            continue
        places.append(gpu)
        left -= size
    return places


def even(blocks: Sequence[Block], rooms: Sequence[int]) -> list[int]:
    """As `fill`, but the room of every GPU is cut by the same share, as far as all blocks still fit. The last GPU is then not left
    empty while the first is full. Where not all blocks fit, this is `fill` itself."""
    places = fill(blocks, rooms)
    if CPU in places:
        return places
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        tried = fill(blocks, [int(middle * room) for room in rooms])
        if CPU in tried:
            low = middle
        else:
            high, places = middle, tried
    return places


def loads(blocks: Sequence[Block], places: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Bytes of weights and of state on each of `count` GPUs."""
    found = [[0, 0] for _ in range(count)]
    for block, place in zip(blocks, places):
        if place != CPU:
            found[place][0] += block.weights
            found[place][1] += block.state
    return [(weights, state) for weights, state in found]


def ranges(blocks: Sequence[Block], places: Sequence[int], gpu: int) -> str:
    """What a GPU holds, in words: "embedding, layers 0-9"."""
    runs: list[list[str]] = []  # [kind, first number, last number]
    for block, place in zip(blocks, places):
        if place == gpu:
            kind, _, number = block.name.rpartition(" ")
            if kind and runs and runs[-1][0] == kind:
                runs[-1][2] = number
            elif kind or [number] not in runs:
                runs.append([kind, number, number] if kind else [number])
    return ", ".join(_run(*run) for run in runs) or "nothing"


def _run(kind: str, first: str = "", last: str = "") -> str:
    return f"{kind} {first}".rstrip() if first == last else f"{kind}s {first}-{last}"
