"""Data parallel training: the processes that torchrun has started, if any. Each has the whole model and a part of a step's rows.

Only the gradients of what is trained are exchanged, as sums, in buffers of some size. All processes know all rows, so that the
order of data, and with it the result, does not depend on their number beyond rounding.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")
_BUFFER_BYTES = 64 << 20  # of gradients that are exchanged together, or one gradient


class Ranks:
    """This process among `count`; `rank` 0 alone writes files and speaks. `close` ends what the constructor began."""

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._opened = False
        if self.count > 1 and not distributed.is_initialized():
            on_gpu = torch.cuda.is_available()
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            distributed.init_process_group("nccl" if on_gpu else "gloo")
            self._opened = True

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> list[T]:
        """Those of `items` that are this process's."""
        return list(items[self.rank :: self.count])

    def add(self, gradients: Iterable[torch.Tensor], total: torch.Tensor) -> None:
        """Makes each float32 gradient, and `total`, the sum over all processes, in place."""
        if self.count == 1:
            return
        for some in _buffers(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in some])
            distributed.all_reduce(flat)
            for gradient, part in zip(some, flat.split([gradient.numel() for gradient in some])):
                gradient.copy_(part.view(gradient.shape))
        distributed.all_reduce(total)

    def agreed(self, value: bool) -> bool:
        """Whether any process says yes."""
        if self.count == 1:
            return value
        said = torch.tensor(float(value), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
        distributed.all_reduce(said)
        return bool(said.item())

    def told(self, value: T | None) -> T | None:
        """What the first process has."""
        if self.count == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def close(self) -> None:
        """Ends the group of processes, if this object has made it."""
        if self._opened:
            distributed.destroy_process_group()
            self._opened = False


def _buffers(gradients: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """`gradients` in their order, as many together as a buffer has room for."""
    some: list[torch.Tensor] = []
    for gradient in gradients:
        if some and sum(each.nbytes for each in some) + gradient.nbytes > _BUFFER_BYTES:
            yield some
            some = []
        some.append(gradient)
    if some:
        yield some
