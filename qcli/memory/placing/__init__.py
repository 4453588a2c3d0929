"""Where a model goes: GPUs, blocks, and whether it fits."""
