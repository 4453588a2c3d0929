"""What this process costs, and what the machine has left for it."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def peak_memory() -> int:
    """Bytes of the largest resident set so far (VmHWM; mapped file pages count)."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int:
    """Bytes of the resident set now. The peak where the system does not report it."""
    import psutil

    try:
        return psutil.Process().memory_info().rss
    except (OSError, psutil.Error):
        return peak_memory()


def reset_peak_memory() -> None:
    """Makes `peak_memory` count from here on. Linux allows that; elsewhere nothing happens."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def available_memory() -> int | None:
    """Bytes that a process may take before the system swaps, or a limit of its control group (as of a container) stops it. None
    where the system does not report it."""
    import psutil

    try:
        return min([psutil.virtual_memory().available, *_left_by_groups()])
    except (OSError, psutil.Error):
        return None


def _left_by_groups() -> Iterator[int]:
    """What each limit of memory leaves, of the control group that the process is in and of those around it. Pages of files that
    are not in use count as left: the system gives them up."""
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            root = CGROUPS / "memory" if controllers else CGROUPS
            limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
            folder = root / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group == root.parent:
                    break
                try:
                    most, used = (int((group / name).read_text()) for name in (limit, usage))
                    stat = dict(row.split() for row in (group / "memory.stat").read_text().splitlines())
                    yield max(0, most - used + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
                except (OSError, ValueError):  # no such file; the word max, where there is no limit
                    continue


@contextmanager
def importing() -> Iterator[None]:
    """For the first import of torch and transformers by a command. Python looks for garbage while they make a million objects that
    stay: a fifth of the time. Here it does not, and it leaves these objects out later. Does nothing once torch is loaded."""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
