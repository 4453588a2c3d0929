"""On-disk formats. One format is one file here; a format names tensors, a method fills them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: full name, safetensors dtype code, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]
