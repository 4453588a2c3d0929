"""Progress of long work, for those who want to see it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int, str], None]
"""Is called with the bytes that were just finished and the name of what they belong to."""


class Bar(Protocol):
    """What shows progress."""

    def advance(self, count: int, name: str) -> None:
        """`count` more bytes are finished; they belong to `name`."""
        ...


Progress = Callable[[int, int], AbstractContextManager[Bar]]
"""`progress(total, done)` opens a bar of `total` bytes, of which `done` are finished."""


@contextmanager
def shown(progress: Progress | None, total: int, done: int = 0) -> Iterator[Advance]:
    """Opens a bar and gives its `advance`. Without `progress` nothing is shown."""
    if progress is None:
        yield lambda count, name: None
        return
    with progress(total, done) as bar:
        yield bar.advance
