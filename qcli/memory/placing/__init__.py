"""How a model is placed: GPUs, blocks, and whether it fits."""
