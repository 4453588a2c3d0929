"""How the GPU benchmark measures times, and a stand-in on a CPU, which only shows that the scripts run.

A candidate is a function of a number: call i works on copy i of its data, so no call finds the previous call's data in the cache.
On a GPU all calls of a round are one CUDA graph if they can be captured, else calls from Python ("eager" in the tables). Two
events enclose a round. Candidates take turns, and the result is the median of the rounds.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

from qcli.runtime import cuda

ROUNDS = 15
LONG_ENOUGH = 3e-3  # seconds per round; its events and its launch are negligible in comparison
HEAD_START = 2_000_000  # clock cycles, about 1 ms, for which the GPU is kept busy while the host begins a round


@dataclass
class Candidate:
    """`run` is called with the number of a copy; there are `copies`. `captured` is False for calls that wait for the host, or that
    choose their own streams."""

    run: Callable[[int], object]
    copies: int = 1
    captured: bool = True


class Times(dict):
    """Median seconds per call, by candidate. `eager` names those that were not captured."""

    def __init__(self):
        super().__init__()
        self.eager: set[str] = set()

    def microseconds(self) -> dict[str, float]:
        """For the table."""
        return {f"{name} (eager)" if name in self.eager else name: 1e6 * value for name, value in self.items()}


class PerKernel:
    """A backend that launches kernels through another one, with an event before and after each."""

    def __init__(self, backend, mark: Callable[[], object]):
        self.backend, self.mark, self.marks = backend, mark, []

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> object:
        return entry, self.backend.function(source, entry, constants, device)

    def launch(self, function, grid, block, shared: int, arguments: bytes, device: torch.device) -> None:
        entry, real = function
        begin = self.mark()
        self.backend.launch(real, grid, block, shared, arguments, device)
        self.marks.append((entry, begin, self.mark()))


class Gpu:
    """The first CUDA GPU."""

    tiny = False

    def __init__(self):
        self.device = torch.device("cuda", 0)
        self.cache = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.stream = cuda.capture_stream(self.device)

    def layer(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The shape to measure in place of this one."""
        return out_features, in_features

    def tokens(self, count: int) -> int:
        """The number of tokens to measure in place of `count`."""
        return count

    def call(self, name: str, *arguments):
        """Calls the op as users do."""
        return getattr(import_module(f"qcli.ops.{name}"), name)(*arguments)

    def copies(self, nbytes: int) -> int:
        """The number of copies of `nbytes` bytes that together exceed twice the L2 cache."""
        return max(2, 2 * self.cache // max(nbytes, 1) + 1)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self) -> None:
        """Returns unused memory to the driver."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def time(self, candidates: dict[str, Candidate], rounds: int = ROUNDS) -> Times:
        """Median seconds of a call of each."""
        times, samples = Times(), {name: [] for name in candidates}
        ready = {name: self._ready(candidate) for name, candidate in candidates.items()}
        times.eager = {name for name, (_, _, captured) in ready.items() if not captured}
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for turn in range(rounds + 1):
            for name, (launch, calls, _) in ready.items():
                torch.cuda._sleep(HEAD_START)
                begin.record()
                launch()
                end.record()
                end.synchronize()
                if turn:  # the first warms up
                    samples[name].append(begin.elapsed_time(end) / 1e3 / calls)
        times.update({name: statistics.median(values) for name, values in samples.items()})
        return times

    def _ready(self, candidate: Candidate) -> tuple[Callable[[], object], int, bool]:
        """(a function that runs a round of calls, their number, whether they are a graph)."""
        seconds = self._once(candidate)
        calls = candidate.copies * max(1, round(LONG_ENOUGH / seconds / candidate.copies))

        def run() -> deque:
            kept = deque(maxlen=candidate.copies)  # results, too, are then in other memory each time
            for i in range(calls):
                kept.append(candidate.run(i % candidate.copies))
            return kept

        if candidate.captured:
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self.stream):
                    run()
                return graph.replay, calls, True
            except RuntimeError as e:
                print(f"not captured: {str(e).splitlines()[0]}")
                torch.cuda.synchronize()
        return run, calls, False

    def _once(self, candidate: Candidate) -> float:
        """Runs each copy on the stream of the capture, which loads its kernels. Returns the seconds of a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        main = torch.cuda.current_stream()
        stream = self.stream if candidate.captured else main
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for i in range(candidate.copies):
                candidate.run(i)
            begin.record()
            for i in range(candidate.copies):
                candidate.run(i)
            end.record()
        main.wait_stream(stream)
        torch.cuda.synchronize()
        return max(begin.elapsed_time(end) / 1e3 / candidate.copies, 1e-6)

    def kernels(self, run: Callable[[], object]) -> dict[str, float]:
        """Median seconds of each of our kernels that `run` launches, including the events."""

        def mark() -> torch.cuda.Event:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        samples: dict[str, list[float]] = {}
        with cuda.using(PerKernel(cuda._backend, mark)):
            for turn in range(ROUNDS + 1):
                torch.cuda._sleep(HEAD_START)
                run()
                torch.cuda.synchronize()
                for entry, begin, end in cuda._backend.marks if turn else []:
                    samples.setdefault(entry, []).append(begin.elapsed_time(end) / 1e3)
                cuda._backend.marks.clear()
        return {entry: statistics.median(values) for entry, values in samples.items()}


class StandIn:
    """The same on a CPU, with the emulator's kernels and small shapes. Its times mean nothing."""

    tiny = True

    def __init__(self, folder: Path):
        from tests.emulator.emulator import Emulator

        self.device, self.emulator = torch.device("cpu"), Emulator(folder)

    def layer(self, out_features: int, in_features: int) -> tuple[int, int]:
        return 48, 256

    def tokens(self, count: int) -> int:
        return min(count, 33)

    def call(self, name: str, *arguments):
        with self._backend():
            return import_module(f"qcli.ops.{name}")._cuda(*arguments)

    @contextmanager
    def _backend(self) -> Iterator[None]:
        """The emulator, or the backend around it."""
        with cuda.using(cuda._backend if isinstance(cuda._backend, PerKernel) else self.emulator):
            yield

    def copies(self, nbytes: int) -> int:
        return 2

    def synchronize(self) -> None: ...

    def free(self) -> None: ...

    def time(self, candidates: dict[str, Candidate], rounds: int = 1) -> Times:
        times = Times()
        times.eager = {name for name, candidate in candidates.items() if not candidate.captured}
        for name, candidate in candidates.items():
            started = time.perf_counter()
            for i in range(candidate.copies):
                candidate.run(i)
            times[name] = (time.perf_counter() - started) / candidate.copies
        return times

    def kernels(self, run: Callable[[], object]) -> dict[str, float]:
        with cuda.using(PerKernel(self.emulator, time.perf_counter)):
            run()
            return {entry: end - begin for entry, begin, end in cuda._backend.marks}
