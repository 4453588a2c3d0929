"""The C heap of this process."""

import ctypes
from functools import cache


@cache
def _trim():
    """glibc's malloc_trim; None with another C library."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # TypeError: Windows wants a name
        return None


def give_back() -> None:
    """Returns free pages of the heap to the system: small tensors that stay lie between large ones that went, and without this
    a long run grows by what they pin."""
    if (trim := _trim()) is not None:
        trim(ctypes.c_size_t(0))
