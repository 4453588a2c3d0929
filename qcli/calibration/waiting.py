"""Hidden states that wait on the disk between two blocks, where memory has no room for them.

They lie in a file without a name: it is removed as soon as it is open, so that nothing is left of it however the process ends. A
state is mapped, and stays an ordinary tensor for the model's code. Its pages are given back to the system once it is written or
used, so that they count as no memory of the process, and the system may keep them in its cache as long as there is room.

Each call has two places: what leaves a block is written beside what entered it. What the embedding gives has a place of its own,
since transformers keeps it. Where gradients come back, what leaves each block has one.
"""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qcli.errors import CheckpointError

_NAME = "hidden-states"


class WaitingStates:
    """States in a file in `folder`. Use as a context manager. Threads may keep states of different calls at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._end = 0
        self._places: dict[tuple[int, int], mmap.mmap] = {}
        self._turns: dict[int, int] = {}
        self._apart: dict[int, mmap.mmap] = {}  # by address
        self._growing = threading.Lock()

    def __enter__(self) -> "WaitingStates":
        path = self.folder / _NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            os.unlink(path)
        except OSError as e:
            raise CheckpointError(f"cannot write {path}: {e.strerror}", "Mend that, and run the same command again.") from e
        return self

    def __exit__(self, *exc: object) -> None:
        self._places.clear()
        self._apart.clear()
        os.close(self._fd)

    def keep(self, call: int, output: Any) -> Any:
        """`output`, what a block gave the call of this number, with its hidden states in the file."""
        if isinstance(output, tuple):
            return (self.keep(call, output[0]), *output[1:])
        turn = self._turns[call] = 1 - self._turns.get(call, 0)
        if (call, turn) not in self._places:
            self._places[call, turn] = self._place(output.nbytes)
        if (before := self._places.get((call, 1 - turn))) is not None:
            before.madvise(mmap.MADV_DONTNEED)  # what entered the block
        return _moved(output, self._places[call, turn])

    def apart(self, output: Any) -> Any:
        """`output`, what a block gave, with its hidden states in a place of their own, which is never written again."""
        if isinstance(output, tuple):
            return (self.apart(output[0]), *output[1:])
        place = self._place(output.nbytes)
        moved = _moved(output, place)
        with self._growing:
            self._apart[moved.data_ptr()] = place
        return moved

    def release(self, tensor: torch.Tensor) -> None:
        """Gives the pages of a tensor back that `apart` returned, until it is used again. Does nothing to others."""
        if (place := self._apart.get(tensor.data_ptr())) is not None:
            place.madvise(mmap.MADV_DONTNEED)

    @contextmanager
    def of_embedding(self, module: nn.Module) -> Iterator[None]:
        """While this lasts, what `module` gives lies in the file."""
        handle = module.register_forward_hook(lambda module, args, output: _moved(output, self._place(output.nbytes)))
        try:
            yield
        finally:
            handle.remove()

    def _place(self, nbytes: int) -> mmap.mmap:
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._growing:
            start, self._end = self._end, self._end + size
        try:
            os.posix_fallocate(self._fd, start, size)
        except OSError as e:
            raise CheckpointError(
                f"{self.folder} has no room for hidden states: {e.strerror}", "Free some space, and run the same command again."
            ) from e
        return mmap.mmap(self._fd, size, offset=start)


def _moved(tensor: torch.Tensor, place: mmap.mmap) -> torch.Tensor:
    """A copy of a tensor in a mapped place, whose pages are not in memory."""
    count = tensor.numel()
    copy = torch.frombuffer(place, dtype=tensor.dtype, count=count).view(tensor.shape) if count else tensor
    copy.copy_(tensor)
    place.madvise(mmap.MADV_DONTNEED)
    return copy
