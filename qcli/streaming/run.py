"""Forward passes that wait for each other. All of them reach a unit, then its weights are read, then all of them pass it.

Each call of the model runs in a greenlet of its own and is suspended where it enters a unit. So the code around the blocks stays
transformers' own, with its masks, its position embeddings and all that one block passes to the next. Each unit's weights are read
once for all calls. While a call waits, it keeps its hidden states and nothing else.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from qcli.runtime.heap import keep_free_pages
from qcli.streaming.skeleton import Skeleton
from qcli.streaming.units import Unit


@dataclass
class Call:
    """A forward pass. `run()` calls the model. Calls of one `variant` see the same change of the model. `batch` is the caller's."""

    run: Callable[[], Any]
    variant: str = ""
    batch: Any = None


@dataclass
class Pass:
    """A call that has entered a block, with the block's own forward and the arguments of this call."""

    call: Call
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self) -> Any:
        """What the block gives."""
        return self.forward(*self.args, **self.kwargs)


class Observer:
    """Is called at each unit. The default does nothing."""

    def through(self, unit: Unit) -> Callable[[Sequence[Pass]], Iterator[Any]] | None:
        """Who takes all calls through the block `unit` at once: a function that gives each pass its output, in their order. None,
        the default, lets each call run the block itself, one after another."""
        return None

    def loaded(self, unit: Unit) -> None:
        """The weights of `unit` are in memory, and no call has passed it yet."""

    def passed(self, unit: Unit) -> None:
        """Every call has passed `unit`; its weights are still in memory."""

    def variant(self, unit: Unit, name: str) -> AbstractContextManager:
        """A context manager that is entered while the calls of a variant pass `unit`."""
        return nullcontext()


def current_call() -> Call | None:
    """The call that is running; None outside of any."""
    return getattr(getcurrent(), "call", None)


def same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two inputs of modules in one call are the same values in the same memory."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def run_calls(
    skeleton: Skeleton, calls: Sequence[Call], observer: Observer | None = None, *, keep: bool = False, grad: bool = False
) -> list[Any]:
    """What each call returned, in their order. `keep` leaves the weights in memory. With `grad`, autograd records what the calls
    do, but for blocks that the observer takes them through.

    Raises what a call raises.
    """
    keep_free_pages()
    observer = observer or Observer()
    results: dict[int, Any] = {}
    threads: list[greenlet] = []
    waiting: list[tuple[int, greenlet, Unit]] = []
    entered: list[tuple[int, greenlet, Pass]] = []

    def advance(index: int, thread: greenlet, *arguments: object) -> None:
        wanted = thread.switch(*arguments)
        if thread.dead:
            results[index] = wanted
        elif isinstance(wanted, Pass):
            entered.append((index, thread, wanted))
        else:
            waiting.append((index, thread, wanted))

    mode = torch.enable_grad() if grad else torch.inference_mode()
    with mode, _suspended(skeleton), _handing_over(skeleton, observer):
        skeleton.load(skeleton.embedding)  # some models ask for its device before they enter it
        try:
            for i, call in enumerate(calls):
                thread = greenlet(call.run)
                thread.call = call
                threads.append(thread)
                advance(i, thread)
            while waiting:
                unit = _next(waiting)
                here = [entry for entry in waiting if entry[2] is unit]
                waiting[:] = [entry for entry in waiting if entry[2] is not unit]
                skeleton.load(unit)
                observer.loaded(unit)
                through = observer.through(unit)
                for variant in dict.fromkeys(thread.call.variant for _, thread, _ in here):
                    with observer.variant(unit, variant):
                        for index, thread, _ in here:
                            if thread.call.variant == variant:
                                advance(index, thread)
                        if through:
                            passes, entered[:] = entered[:], []
                            outputs = through([each for _, _, each in passes])
                            while passes:
                                index, thread, _ = passes.pop(0)
                                advance(index, thread, next(outputs))
                observer.passed(unit)
                if not keep:
                    skeleton.unload(unit)
        finally:
            for thread in threads:
                thread.throw(GreenletExit)  # does nothing to a finished one
    return [results[i] for i in range(len(calls))]


def _next(waiting: list[tuple[int, greenlet, Unit]]) -> Unit:
    """The next unit to load: first those outside of the blocks, then the earliest block. So no call overtakes another."""
    return min((unit for _, _, unit in waiting), key=lambda unit: -1 if unit.index is None else unit.index)


@contextmanager
def _handing_over(skeleton: Skeleton, observer: Observer) -> Iterator[None]:
    """While this lasts, a call that enters a block which `observer` takes all calls through hands over its pass, and waits for the
    output."""
    changed = []

    def handing_over(forward: Callable) -> Callable:
        def hand_over(*args, **kwargs):
            call = current_call()
            return getcurrent().parent.switch(Pass(call, forward, args, kwargs)) if call else forward(*args, **kwargs)

        return hand_over

    try:
        for unit in skeleton.blocks:
            if observer.through(unit) is not None:
                unit.module.forward = handing_over(unit.module.forward)  # before any call, which looks it up as it enters
                changed.append(unit.module)
        yield
    finally:
        for module in changed:
            del module.forward


@contextmanager
def _suspended(skeleton: Skeleton) -> Iterator[None]:
    """While this lasts, a call that enters a unit waits for it."""

    def enter(unit: Unit) -> Callable:
        def wait(module, args):
            if current_call() is not None and not unit.resident:
                getcurrent().parent.switch(unit)

        return wait

    handles = [unit.module.register_forward_pre_hook(enter(unit)) for unit in skeleton.units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
