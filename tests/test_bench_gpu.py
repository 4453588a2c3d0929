"""The GPU benchmark on its stand-in, so that no slip in it is found only where a GPU waits; and how it times."""

import json
from contextlib import contextmanager

import pytest
import torch

from tests.conftest import ROOT
from tests.emulator.emulator import Emulator, missing
from tests.gpu.images import wanted


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
def test_every_part_runs(benchmarks, emulated, tmp_path, monkeypatch):
    import gpu
    import gpu_linears

    monkeypatch.setattr(gpu_linears, "TOKENS", (1, 8, 32))
    asked, function = set(), Emulator.function

    def noting(self, source, entry, constants, device):
        asked.add((source, tuple(sorted(constants))))
        return function(self, source, entry, constants, device)

    monkeypatch.setattr(Emulator, "function", noting)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        found = gpu.measure(gpu.StandIn(emulated), list(gpu.PARTS), tmp_path, tmp_path / "figures")
    rows = found["rows"]
    assert not found["failed"] and json.loads((tmp_path / "figures").read_text())["rows"] == rows
    assert {row["part"] for row in rows} >= {"ceilings", *gpu.PARTS} - {"launch"}
    timed = [row for row in rows if row["unit"] == "microseconds"]
    assert len(timed) > 30 and all(value > 0 for row in timed for value in row["figures"].values())
    bounds = [(ratio["must"], ratio["aim"]) for row in rows for ratio in row["ratios"]]
    for bound in [
        (">= 0.7", 0.85),
        (">= 0.45", 0.60),
        (">= 0.65", 0.80),
        (">= 1.5", None),
        ("", 0.65),
        (">= 1", None),
        (">= 0.64", None),
        (">= 0.86", None),
        (">= 1.22", None),
        ("", 1.65),
        (">= 3", None),
        ("", 0.6),
    ]:
        assert bound in bounds, bound
    errors = [row["figures"] for row in rows if row["unit"] == "relative error" and "stored" in row["work"]]
    assert errors and all(row["linear_w8a16"] < row["linear_int8"] < 0.1 for row in errors)
    parts = {name for row in rows if ", parts, " in row["work"] for name in row["figures"]}
    assert {"linear_int8_gemm", "linear_int8_epilogue", "list_outliers", "torch._int_mm"} <= parts
    beforehand = {(source, tuple(sorted(constants))) for source, constants in wanted({})}  # what it compiles first
    assert len(asked) > 10 and asked <= beforehand


def test_a_part_that_fails_does_not_end_the_others(benchmarks, tmp_path, monkeypatch, capsys):
    import gpu
    import gpu_linears

    def fails(*_):
        yield "microseconds", gpu.Row("before", {"qcli": 1.0})
        raise RuntimeError("no memory left")

    monkeypatch.setattr(gpu_linears, "nf4", fails)
    monkeypatch.setattr(gpu_linears, "int8", lambda *_: [("microseconds", gpu.Row("behind", {"qcli": 1.0}))])
    monkeypatch.setattr(gpu.gpu_ops, "ceilings", lambda gpu: ({}, []))
    found = gpu.measure(gpu.StandIn(tmp_path), ["nf4", "few"], tmp_path)
    assert found["failed"] == ["nf4"] and [row["work"] for row in found["rows"]] == ["before", "behind"]
    assert "no memory left" in capsys.readouterr().err


class Clock:
    """A torch.cuda whose time passes only where a test says so; a graph takes as long as what was captured."""

    def __init__(self, monkeypatch):
        self.now, self.capturing = 0.0, False
        for name in ("Event", "CUDAGraph", "graph", "stream", "current_stream", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name), raising=False)

    def Event(self, enable_timing):
        clock = self

        class Event:
            def record(self):
                self.at = clock.now

            def synchronize(self): ...

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        return Event()

    def CUDAGraph(self):
        clock = self

        class Graph:
            def replay(self):
                clock.now += self.lasts

        return Graph()

    @contextmanager
    def graph(self, graph, stream):
        began, self.capturing = self.now, True
        try:
            yield
        finally:
            graph.lasts, self.now, self.capturing = self.now - began, began, False

    @contextmanager
    def stream(self, stream):
        yield

    def current_stream(self):
        return self

    def wait_stream(self, other): ...

    def synchronize(self): ...

    def _sleep(self, cycles):
        self.now += 1.0  # in no measurement


def test_seconds_of_a_call(benchmarks, monkeypatch):
    from gpu_timing import Candidate, Gpu

    clock, seen = Clock(monkeypatch), []
    gpu = object.__new__(Gpu)
    gpu.stream, gpu.cache = clock, 1000

    def costs(seconds):
        def run(i):
            seen.append(i)
            clock.now += seconds

        return run

    def waits(i):
        if clock.capturing:
            raise RuntimeError("not permitted when a stream is capturing")
        clock.now += 0.25

    times = gpu.time(
        {
            "long": Candidate(costs(0.5)),
            "short": Candidate(costs(1e-4), copies=7),
            "not to capture": Candidate(costs(2e-4), captured=False),
            "not captured": Candidate(waits),
        }
    )
    expected = {"long": 0.5, "short": 1e-4, "not to capture": 2e-4, "not captured": 0.25}
    assert times == pytest.approx(expected) and times.eager == {"not to capture", "not captured"}
    assert set(times.microseconds()) == {"long", "short", "not to capture (eager)", "not captured (eager)"}
    assert [seen.count(i) for i in range(1, 7)] == [seen.count(1)] * 6 and seen.count(1) > 3
    assert gpu.copies(300) * 300 > 2 * gpu.cache and gpu.copies(10**6) == 2
