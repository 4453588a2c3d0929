"""A transformers model larger than memory, run block by block. Each block's weights are read once, and every text passes it."""
