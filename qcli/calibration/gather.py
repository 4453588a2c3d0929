"""Takes texts through a block, several batches at a time, and sums up what reaches its linear modules.

A batch is computed by one thread from end to end, and statistics are added in the order of the batches. So neither the hidden
states nor the sums depend on the number of threads.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from qcli.calibration.statistics import SEGMENTS, Statistics, Turns, segment_of
from qcli.calibration.token_weights import TokenWeights
from qcli.streaming.run import Pass, same_tensor


class Seen(Exception):
    """Every module has been reached: what is left of a pass changes no statistic."""


class Gathered:
    """Statistics `found` of the inputs of `modules`, by their names; those that read the same input share one object."""

    def __init__(self, modules: Iterable[str], found: dict[str, Statistics]):
        self.names, self.found = list(modules), found

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The modules that share statistics, which read the same tensor, in the order of `names`."""
        found: dict[int, list[str]] = {}
        for name in self.names:
            if name in self.found:
                found.setdefault(id(self.found[name]), []).append(name)
        return [tuple(names) for names in found.values()]


class Gatherer(Gathered):
    """Statistics of the linear `modules` of a block, by their names. Those of `with_hessian` get a Hessian, those of `with_sample`
    a sample of magnitudes. Each keeps `kept_tokens` tokens of every batch.

    Modules that read the same tensor, as q, k and v do, share one object. Which do is seen in the first batch, which is taken
    alone; modules that it does not reach share with none. Where it reached each module once, and `whole` is false, a later batch
    ends with Seen at the last module that it reaches: the product of down_proj is a fifth of a block. With `token_weights` tokens
    count by these in sums of squares. The first batch that is gathered is number `first` of so many `batches` of the text.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        with_hessian: Set[str],
        device: torch.device,
        kept_tokens: int = 0,
        with_sample: Set[str] = frozenset(),
        whole: bool = True,
        token_weights: TokenWeights | None = None,
        first: int = 0,
        batches: int = 1,
    ):
        self._whole, self._once = whole, False  # once: every module is reached by every batch, one time
        self.modules, self._with_hessian, self._with_sample, self._device = modules, with_hessian, with_sample, device
        self._kept_tokens, self._token_weights = kept_tokens, token_weights
        self._first, self._batches = first, batches
        super().__init__(modules, {})
        self._leader: dict[str, str] = {}  # of each module that the first batch reached
        self._turns = Turns()
        self._here = threading.local()
        self._making = threading.Lock()
        self._handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]

    def close(self) -> None:
        """Removes the hooks, and ends the sums."""
        for handle in self._handles:
            handle.remove()
        with torch.inference_mode():  # as they were summed
            for statistics in {id(each): each for each in self.found.values()}.values():
                statistics.end()

    def _hook(self, name: str) -> Callable:
        def hook(module, args):
            seen = getattr(self._here, "seen", None)
            if seen is not None:
                seen.setdefault(name, []).append(args[0])
                if self._once and len(seen) == len(self.modules):
                    raise Seen

        return hook

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """While this lasts, what reaches the modules in this thread belongs to the batch `number`. Then it is added."""
        self._here.seen = {}
        with self._turns.batch(number):
            try:
                with suppress(Seen):
                    yield
                self._add(number, self._here.seen)
            finally:
                self._here.seen = None

    def _add(self, number: int, seen: dict[str, list[torch.Tensor]]) -> None:
        if number == 0:
            self._find_leaders(seen)
        for name, inputs in seen.items():
            leader = self._leader.get(name, name)
            if leader != name:
                continue
            rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
            x = (rows[0] if len(rows) == 1 else torch.cat(rows)).float()
            statistics = self._statistics(leader, x.shape[-1])
            weighted = self._weighted(leader, number, x)
            for panel in range(statistics.panels):
                self._turns.wait(number, (leader, panel))
                batch = self._first + number
                statistics.add(x, panel, weighted, batch, segment_of(batch, self._batches))
                self._turns.pass_on(number, (leader, panel))

    def _weighted(self, leader: str, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """x times the square root of what its tokens count. None where they count alike, or where other tokens come here than when
        gradients were taken, as a router of a block that was rounded before may send an expert."""
        weights = self._token_weights.of(self._members(leader), number) if self._token_weights else None
        return None if weights is None or len(weights) != len(x) else x * weights.sqrt().unsqueeze(1)

    def _members(self, leader: str) -> list[str]:
        """The modules that share the statistics of `leader`."""
        return [leader, *(name for name, its in self._leader.items() if its == leader and name != leader)]

    def _find_leaders(self, seen: dict[str, list[torch.Tensor]]) -> None:
        for name, inputs in seen.items():
            same = (
                other
                for other, theirs in seen.items()
                if len(theirs) == len(inputs) and all(same_tensor(a, b) for a, b in zip(inputs, theirs))
            )
            self._leader[name] = next(same)
        self._once = not self._whole and all(len(seen.get(name, ())) == 1 for name in self.modules)

    def _statistics(self, leader: str, in_features: int) -> Statistics:
        with self._making:
            if leader not in self.found:
                members = set(self._members(leader))
                hessian, sample = bool(members & self._with_hessian), bool(members & self._with_sample)
                segments = min(SEGMENTS, self._batches)
                made = Statistics(in_features, hessian, self._device, self._kept_tokens, sample, segments)
                for name in members:
                    self.found[name] = made
            return self.found[leader]


class Crew:
    """The threads that take batches through blocks. Kernels run on one thread in each of them. Use as a context manager."""

    def __init__(self, device: torch.device):
        self.device, self.threads = device, torch.get_num_threads() if device.type == "cpu" else 1

    def __enter__(self) -> "Crew":
        self._before = torch.get_num_threads()
        if self.threads > 1:
            torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="qcli")
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._before)

    def results(self, tasks: Sequence[Callable[[], Any]]) -> Iterator[Any]:
        """What each task returns, in their order, a few tasks ahead. Raises what a task raises."""
        waiting: deque[Future] = deque()
        rest = iter(tasks)
        try:
            while True:
                while len(waiting) <= self.threads and (task := next(rest, None)) is not None:
                    waiting.append(self._pool.submit(_inferring, task))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def gather(self, passes: Sequence[Pass], gatherer: Gatherer, keep: Callable[[int, Any], Any] | None = None) -> list[Any]:
        """Runs every pass and adds what reaches the modules. What `keep` makes of the number and output of each pass."""

        def counted(number: int) -> Any:
            output = None
            with gatherer.batch(number):
                output = passes[number].run()
            return keep(number, output) if keep else None

        tasks = [lambda n=n: counted(n) for n in range(len(passes))]
        return [*self.results(tasks[:1]), *self.results(tasks[1:])]


def _inferring(task: Callable[[], Any]) -> Any:
    with torch.inference_mode():  # which is each thread's own
        return task()
