"""What this process costs."""

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
    """Bytes of the resident set now; the peak where the system does not tell."""
    try:
        with open("/proc/self/status") as file:
            for line in file:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak_memory()


def reset_peak_memory() -> None:
    """Makes `peak_memory` count from here on, where the system allows that (Linux does)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def available_memory() -> int | None:
    """Bytes that a process may take before others are pushed out (MemAvailable); None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
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
