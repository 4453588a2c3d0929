"""A tensor of a checkpoint, read when transformers asks for it: the face of a safetensors slice, over any weight file.

Which tensors these are is the source's decision. Two ways to read: a private map of the file, whose pages the system takes
back as it needs (for a model that stays as it is stored), or a pread into memory (for one that is let go piece by piece).
"""

import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from qcli.checkpoint import dtypes
from qcli.checkpoint.safetensors_file import TensorInfo, read_into


class StoredTensor:
    """`get_dtype`, `get_shape` and indexing as safetensors' slices have them; `load` gives the whole tensor."""

    def __init__(self, info: TensorInfo, load: Callable[[TensorInfo], torch.Tensor]):
        self.info, self._load = info, load

    def get_dtype(self) -> str:
        """The safetensors code."""
        return self.info.dtype

    def get_shape(self) -> list[int]:
        """Its sizes."""
        return list(self.info.shape)

    def __getitem__(self, index) -> torch.Tensor:
        return self._load(self.info)[index]


def pread(fd: int) -> Callable[[TensorInfo], torch.Tensor]:
    """Reads a tensor of the open file `fd` into memory of its own. Raises CheckpointError where the file ends."""

    def load(info: TensorInfo) -> torch.Tensor:
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        read_into(fd, info.start, memoryview(data.numpy()))
        return data.view(dtypes.torch_dtype(info.dtype)).reshape(info.shape)

    return load


def mapped(fd: int) -> Callable[[TensorInfo], torch.Tensor]:
    """Gives a tensor over pages of the file `fd`. That may be closed: the map has a descriptor of its own, while a tensor lives.

    Writes to it stay in this process.
    """
    # Without a reserve: the file may be larger than memory, and nothing writes to it.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    pages = mmap.mmap(fd, os.fstat(fd).st_size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def load(info: TensorInfo) -> torch.Tensor:
        dtype = dtypes.torch_dtype(info.dtype)
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(pages, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        if info.start % dtype.itemsize:
            flat = flat.clone()  # kernels read whole elements
        return flat.view(dtype).reshape(info.shape)

    return load


def state_dict(source, opened: ExitStack) -> Mapping[str, StoredTensor]:
    """Every tensor of `source` by name, over mapped files; `opened` keeps what must be closed after loading.

    Raises CheckpointError, HubError.
    """
    loads = {file: mapped(opened.enter_context(source.open(file))) for file in source.files}
    return {name: StoredTensor(info, loads[info.file]) for name, info in source.tensors.items()}
