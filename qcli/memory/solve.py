"""The largest whole number that still fits."""

from collections.abc import Callable


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n from 1 to `limit` for which fits(n) holds, 0 where there is none.

    Exact for a need that never falls as n grows, which is so of every component of memory in tokens and in sequences: the
    steps of a sliding window, of blocks and of whole layers on a GPU need no care.
    """
    if limit < 1 or not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
