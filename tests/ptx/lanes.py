"""What a lane can be doing, and how registers are kept."""

import numpy as np

READY, AT_BARRIER, IN_WARP, EXITED = range(4)
UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # by a register's bits


class Fault(Exception):
    """What a kernel did that a GPU forbids, with the instruction, the line of the source, the block and the thread."""
