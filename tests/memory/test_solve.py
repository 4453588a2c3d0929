"""The largest number that fits, against trying them all."""

import pytest

from qcli.memory.solve import largest


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 63, 64, 100])
@pytest.mark.parametrize("room", [0, 1, 5, 64, 63, 99, 1000])
def test_against_trying_them_all(limit, room):
    def need(n):  # a window of 16 and steps of 4
        return min(n, 16) + 4 * (n // 4) // 2

    tried = max((n for n in range(1, limit + 1) if need(n) <= room), default=0)
    assert largest(lambda n: need(n) <= room, limit) == tried


def test_it_asks_few_times():
    asked = []
    assert largest(lambda n: asked.append(n) or n <= 123_456, 1 << 24) == 123_456
    assert len(asked) < 40
