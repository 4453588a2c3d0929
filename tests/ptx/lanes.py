"""The states of a lane, and the types of registers."""

import numpy as np

READY, AT_BARRIER, IN_WARP, EXITED = range(4)
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # by the number of bits


class Fault(Exception):
    """A kernel did what a GPU forbids. The message has the instruction, the line of the source, the block and the thread."""
