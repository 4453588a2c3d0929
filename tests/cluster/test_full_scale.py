"""Plans of the largest models, from headers without data, and how their work divides."""

import json
import subprocess
import sys

import pytest

from benchmarks.cluster_scaling import MACHINES, PLAN, seconds_of
from benchmarks.sparse_checkpoints import SHAPES, write
from qcli.quantization.division import division, summary
from qcli.quantization.outputs import evenly
from qcli.quantization.quantize import make_plan

PARAMETERS = {"llama-405b": 405_853_388_800, "deepseek-v3": 671_026_419_200}  # as their authors count them
MEMORY = 600_000_000  # bytes: with room for another torch than the one it was measured with, 495 MB


@pytest.mark.parametrize("name", [*SHAPES])
def test_a_plan_at_full_scale(name, tmp_path):
    model = write(tmp_path / name, *SHAPES[name]())
    assert sum(path.stat().st_blocks * 512 for path in model.iterdir()) < 100_000_000
    found = subprocess.run(
        [sys.executable, "-c", PLAN, str(model), str(tmp_path / "out"), "5GB"], capture_output=True, text=True, check=True
    )
    about = json.loads(found.stdout)
    assert about["peak_bytes"] < MEMORY
    assert all("of disk at" in problem for problem in about["problems"]), about["problems"]


def test_files_are_as_equal_as_they_can_be(tmp_path):
    model = write(tmp_path / "llama", *SHAPES["llama-405b"]())
    plan = make_plan(str(model), tmp_path / "out", bits=4)
    assert plan.parameters == PARAMETERS["llama-405b"] and len(plan.shards) > 40
    sizes = [shard.size for shard in plan.shards]
    assert max(sizes) * len(sizes) / sum(sizes) < 1.05 and max(sizes) <= 5_000_000_000
    parts = division(plan, range(len(plan.work)))
    assert sorted(work.index for _, works in parts for work in works) == list(range(len(plan.work)))
    assert all({output.file for work in works for output in work.outputs} == {file} for file, works in parts)
    reads = [sum(work.info.nbytes for work in works) for _, works in parts]
    assert reads == sorted(reads, reverse=True)
    assert "of 8 workers the one with the most reads" in summary(plan, 8)


@pytest.mark.parametrize(
    "sizes, most, starts",
    [
        ([], 10, []),
        ([4, 4, 4, 4], 10, [2]),
        ([9, 1, 1, 1, 1, 1], 10, [1]),
        ([3, 3, 3, 3, 3, 3, 3], 9, [3, 6]),  # three groups of up to nine: none is smaller at its largest
        ([1] * 10, 4, [4, 8]),
        ([7, 30, 7], 10, [1, 2]),  # one is too large, and alone
        ([0, 0], 5, []),
    ],
)
def test_groups_of_neighbours(sizes, most, starts):
    found = evenly(sizes, most)
    ends = [0, *found, len(sizes)]
    assert found == starts or max(sum(sizes[a:b]) for a, b in zip(ends, ends[1:])) <= most
    assert len(found) == len(starts)


@pytest.mark.parametrize("seed", range(30))
def test_groups_are_the_best_there_are(seed):
    """Against all ways to divide, by dynamic programming."""
    import random
    from functools import cache

    rng = random.Random(seed)
    sizes = [rng.randint(0, 100) if rng.random() < 0.9 else 300 for _ in range(rng.randint(1, 30))]
    most = rng.randint(100, 400)

    @cache
    def best(first: int) -> tuple[int, int]:
        if first == len(sizes):
            return 0, 0
        found = []
        for end in range(first + 1, len(sizes) + 1):
            size = sum(sizes[first:end])
            if size > most and end > first + 1:
                break
            groups, largest = best(end)
            found.append((groups + 1, max(largest, size if size <= most else 0)))
        return min(found)

    ends = [0, *evenly(sizes, most), len(sizes)]
    groups = [sum(sizes[a:b]) for a, b in zip(ends, ends[1:])]
    assert (len(groups), max((size for size in groups if size <= most), default=0)) == best(0)


def test_the_simulation_is_arithmetic_where_that_is_simple():
    """Ten files of 4 GB to read and 1 GB to write."""
    files = [(4_000_000_000, 1_000_000_000)] * 10
    far = 1e15
    assert seconds_of(files, 1, 2e9, far, far, 0.0) == pytest.approx(20)  # 40 GB at 2 GB/s
    assert seconds_of(files, 5, 2e9, far, far, 0.0) == pytest.approx(4)
    assert seconds_of(files, 256, 2e9, far, far, 0.0) == pytest.approx(2)  # a file is the least that a machine takes
    assert seconds_of(files, 1, far, 1e9, far, 0.0) == pytest.approx(50)  # 50 GB through its network
    assert all(seconds_of(files, n, far, far, 5e9, 0.0) == pytest.approx(10) for n in MACHINES)  # and through the store
    assert seconds_of(files, 1, 2e9, far, far, 0.5) == pytest.approx(25)
