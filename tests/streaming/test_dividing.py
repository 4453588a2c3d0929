"""Windows divided over machines."""

from qcli.streaming.corpus import Window
from qcli.streaming.dividing import divided

LENGTHS = [2048, 100, 100, 1000, 1000, 1000, 2048, 7, 2048]
WINDOWS = [Window(tuple(range(n)), 1, n) for n in LENGTHS]


def test_windows_of_one_call_stay_together():
    parts = divided(WINDOWS, [2, 1])
    assert sorted(i for part in parts for i in part) == list(range(len(WINDOWS)))
    assert all(part == sorted(part) for part in parts)
    loads = [sum(LENGTHS[i] for i in part) for part in parts]
    assert 1.2 < loads[0] / loads[1] < 3.5
    assert {3, 4} <= set(parts[0]) or {3, 4} <= set(parts[1])  # two of 1,000 tokens are one call
    assert divided(WINDOWS[:1], [1, 1, 1]) == [[0], [], []]


def test_what_is_not_padded_has_calls_of_one_length():
    mixed = [WINDOWS[i] for i in (1, 7, 2, 7)]
    assert divided(mixed, [1, 1]) == [[0, 1, 2, 3], []]
    assert divided(mixed, [1, 1], padded=False) == [[0, 2], [1, 3]]
