"""Threads on a machine that other processes use too: how long a waiting thread spins, and how many threads there are.

torch's OpenMP pool ends every parallel product with a barrier, and by default its threads spin there for milliseconds. Beside
one busy process this is slow: at every product of every layer, a spinning thread occupies the core that a suspended thread
needs, and waits for that thread. No spinning at all is slow too: on a quiet machine, waking a thread takes longer than the small
products of a token. Threads therefore spin for about the time that Python needs between two products (`settle`, which OpenMP
reads once, when torch is loaded). And there are as many threads as cores that other processes leave free (`following`, twice a
second). Settings in the user's environment take precedence, and so does a number of threads that other code has set.

A float32 product of one row may differ in its last bits with the number of threads, because libraries split its sum among them.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from math import ceil, floor
from pathlib import Path

# Turns of libgomp's waiting loop, some 0.3 to 0.5 ms. Its default of 300,000 lasts longer than a time slice of Linux.
SPINS = "10000"
INTERVAL = 0.5  # seconds between two measurements of the load

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_COUNTING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_DYNAMIC", "OMP_THREAD_LIMIT")
_STRAY = 0.4  # cores; occasional background work takes less, a busy process that shares a core with a thread takes more


def settle(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets how long torch's threads spin. Does nothing if the environment sets it already, or if torch is loaded."""
    if "torch" not in sys.modules and not any(environment.get(name) for name in _WAITING):
        environment["GOMP_SPINCOUNT"] = SPINS


@contextmanager
def following(environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """While this lasts, torch uses as many threads in the main thread as cores are free: the cores that this process may use, less
    those that other processes use. It keeps at least half of them, a fair share however busy the others are.

    torch may be imported later. Does nothing if the environment sets a number, or if the system does not report the load.
    """
    if any(environment.get(name) for name in _COUNTING) or _work() is None:
        yield
        return
    over, counts = threading.Event(), []
    watch = threading.Thread(target=_watch, args=(over, counts), name="qcli threads", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()
        for count in counts:
            count.restore()


def wanted(most: int, free: float) -> int:
    """The number of threads for `free` cores: at least half of `most`, at most all."""
    return max(min(floor(free + _STRAY), most), ceil(most / 2), 1)


def cores() -> float:
    """The cores that this process may use: its affinity, or less if a container has a quota."""
    return min([_allowed(), *_quotas()])


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[float]:
    """The cores of every quota on this process: control groups of version 2, and of version 1 as a container sees them."""
    found = []
    try:
        paths = [line[3:] for line in own.read_text().splitlines() if line.startswith("0::")]
    except OSError:
        paths = []
    for path in paths or ["/"]:
        group = root / path.strip("/")
        found += [_read(each / "cpu.max") for each in (group, *group.parents) if each.is_relative_to(root)]
    found.append(_read(root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us"))
    return [quota for quota in found if quota]


def _read(*files: Path) -> float | None:
    """Quota / period, from one file or two; None if there is no quota."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # the quota is "max": none
        return None


def _work() -> tuple[float, float] | None:
    """(seconds that this process's cores have worked in total, seconds of this process). None if the system does not report them.

    Time that a hypervisor has taken counts as work of other processes.
    """
    try:
        allowed = os.sched_getaffinity(0)
        with open("/proc/stat") as file:
            rows = [line.split() for line in file if line.startswith("cpu") and line[3].isdigit()]
    except (AttributeError, OSError):
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    ticks = sum(sum(map(int, (*row[1:4], *row[6:9]))) for row in rows if int(row[0][3:]) in allowed)
    return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


class _Count:
    """Sets torch's number of threads. On a quiet machine that is torch's own default, limited by a quota."""

    def __init__(self):
        self._torch = sys.modules["torch"]
        self._first = self._last = self._torch.get_num_threads()
        self._most = max(min(self._last, round(cores())), 1)
        self._next = self._last
        self._done = threading.Event()
        self._done.set()

    def ask(self, free: float) -> None:
        """Asks the main thread to set the number for `free` cores."""
        self._next = wanted(self._most, free)
        if self._next != self._last and self._done.is_set():
            self._done.clear()
            _in_main_thread(self._set)

    def restore(self) -> None:
        """Sets the original number again. Must be called in the main thread."""
        self._next = self._first
        self._set()

    def _set(self) -> None:
        if self._torch.get_num_threads() == self._last:  # otherwise other code has set a number of its own
            self._torch.set_num_threads(self._next)
            self._last = self._next
        self._done.set()


def _watch(over: threading.Event, counts: list[_Count]) -> None:
    before, then = _work(), time.perf_counter()
    while not over.wait(INTERVAL):
        work, now = _work(), time.perf_counter()
        if work is None:
            return
        others = max((work[0] - before[0]) - (work[1] - before[1]), 0.0) / (now - then)
        before, then = work, now
        if not counts and _torch_is_there():
            counts.append(_Count())
        for count in counts:
            count.ask(_allowed() - others)


def _torch_is_there() -> bool:
    torch = sys.modules.get("torch")
    return hasattr(torch, "compile")  # one of the last names that importing torch defines


def _in_main_thread(function) -> None:
    """Calls `function` in the main thread, between two of its bytecodes. Another thread could not do the same: OpenMP keeps a
    number of threads for each thread that starts some."""
    import ctypes

    global _pending
    _pending = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(lambda _: function() or 0)
    ctypes.pythonapi.Py_AddPendingCall(_pending, None)


_pending = None  # the function that Python will call; it must stay referenced until then
