"""Progress of long work, for those who want to see it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

Advance = Callable[[int, str], None]
"""Is called with the bytes that were just finished and the name of what they belong to."""


@dataclass(frozen=True)
class WorkerShown:
    """A worker of a cluster: its machine, its bytes a second of late, and what it works on. A slow one has less than half of the
    median rate."""

    host: str
    rate: float
    doing: str
    slow: bool


class Bar(Protocol):
    """What shows progress."""

    def advance(self, count: int, name: str) -> None:
        """`count` more bytes are finished; they belong to `name`."""
        ...

    def workers(self, found: Sequence[WorkerShown]) -> None:
        """What each worker of a cluster does now."""
        ...


class NoBar:
    """Shows nothing."""

    def advance(self, count: int, name: str) -> None:
        """See Bar."""

    def workers(self, found: Sequence[WorkerShown]) -> None:
        """See Bar."""


Progress = Callable[[int, int], AbstractContextManager[Bar]]
"""`progress(total, done)` opens a bar of `total` bytes, of which `done` are finished."""


@contextmanager
def bar_of(progress: Progress | None, total: int, done: int = 0) -> Iterator[Bar]:
    """Opens a bar. Without `progress` nothing is shown."""
    if progress is None:
        yield NoBar()
        return
    with progress(total, done) as bar:
        yield bar


@contextmanager
def shown(progress: Progress | None, total: int, done: int = 0) -> Iterator[Advance]:
    """Opens a bar and gives its `advance`. Without `progress` nothing is shown."""
    with bar_of(progress, total, done) as bar:
        yield bar.advance
