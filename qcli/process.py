"""What this process costs, and what the machine has left for it."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Bytes that a process may take before the system swaps. None where the system does not report it."""
    import psutil

    try:
        return psutil.virtual_memory().available
    except (OSError, psutil.Error):
        return None


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
