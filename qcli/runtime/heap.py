"""The C heap of this process."""

import ctypes
import os
from contextlib import suppress
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h


@cache
def _trim():
    """glibc's malloc_trim; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows needs a name
        return None


def give_back() -> None:
    """Returns free pages of the heap to the system. Small tensors that stay lie between large ones that were freed; without this
    call a long run would grow by the pages that they hold back."""
    if (trim := _trim()) is not None:
        trim(ctypes.c_size_t(0))


@cache
def give_back_large() -> None:
    """Returns the pages of tensors of 4 MB or more as soon as they are freed. By default glibc learns to keep those of up to 32 MB
    in the heap, where what a training step keeps lies between them: a process takes two to three times what its tensors do. Does
    nothing if the environment configures malloc."""
    _set(4_000_000, 8_000_000)


@cache
def keep_free_pages() -> None:
    """Keeps freed memory in the heap, up to 64 MiB at its end, until `give_back`. By default glibc returns the pages of tensors of
    some hundred kilobytes after each operation, and the system zeroes the same pages for the next one: a tenth of the time of
    small models. Does nothing if the environment configures malloc."""
    _set(16 << 20, 64 << 20)


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, mmap_threshold)
        mallopt(_TRIM_THRESHOLD, trim_threshold)
