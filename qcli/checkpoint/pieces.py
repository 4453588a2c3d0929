"""Weight files read in pieces that are asked for in advance, so that reading goes on while a piece is worked on."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from qcli.checkpoint.source import Source

PIECE_BYTES = 4 << 20  # what a piece should have: on a hub a ranged request each
_AHEAD = 4  # pieces under way at once, for a hub's answers take their time


def read_pieces(source: Source, pieces: Iterable[tuple[str, int, int]]) -> Iterator[bytes]:
    """The bytes of each (file, offset, count), in their order. Raises what `Source.read` raises."""
    pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="qcli")
    under_way = deque()
    try:
        for piece in pieces:
            under_way.append(pool.submit(source.read, *piece))
            if len(under_way) > _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
