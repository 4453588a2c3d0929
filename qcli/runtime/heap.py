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
def keep_free_pages() -> None:
    """Keeps freed memory in the heap, up to 64 MiB at its end, until `give_back`. By default glibc returns the pages of tensors of
    some hundred kilobytes after each operation, and the system zeroes the same pages for the next one: a tenth of the time of
    small models. Does nothing if the environment configures malloc."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 16 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)
