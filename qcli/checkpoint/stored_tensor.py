"""A tensor of a checkpoint that is read when transformers asks for it. It has the interface of a safetensors slice.

The source decides which tensors there are. There are two ways to read one. A private map of the file suits a model that stays as
it is stored: the system can take its pages back. A pread into memory suits a model whose weights are released one by one.
"""

import mmap
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch

from qcli.checkpoint import dtypes
from qcli.checkpoint.safetensors_file import TensorInfo, read_into


class StoredTensor:
    """`get_dtype`, `get_shape` and indexing are those of a safetensors slice. `load` gives the whole tensor."""

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
    """A function that reads a tensor of the open file `fd` into new memory. It raises CheckpointError where the file ends early."""

    def load(info: TensorInfo) -> torch.Tensor:
        data = torch.empty(info.nbytes, dtype=torch.uint8)
        read_into(fd, info.start, memoryview(data.numpy()))
        return data.view(dtypes.torch_dtype(info.dtype)).reshape(info.shape)

    return load


def mapped(fd: int) -> Callable[[TensorInfo], torch.Tensor]:
    """A function that gives a tensor over mapped pages of the file `fd`, which may be closed: the map has its own descriptor.

    The map lives as long as one of its tensors. Writes to a tensor stay in this process.
    """
    # No swap is reserved: the file may be larger than memory, and normally nothing writes to it.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    pages = mmap.mmap(fd, os.fstat(fd).st_size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    def load(info: TensorInfo) -> torch.Tensor:
        dtype = dtypes.torch_dtype(info.dtype)
        if not info.numel:
            return torch.empty(info.shape, dtype=dtype)
        flat = torch.frombuffer(pages, dtype=torch.uint8, count=info.nbytes, offset=info.start)
        if info.start % dtype.itemsize:
            flat = flat.clone()  # kernels need aligned elements
        return flat.view(dtype).reshape(info.shape)

    return load


def state_dict(source, opened: ExitStack, held: Callable[[TensorInfo], bool] = lambda info: True) -> Mapping[str, StoredTensor]:
    """The tensors of `source` that are `held` by name, over mapped files. `opened` receives what must be closed after loading.

    Raises CheckpointError, HubError.
    """
    loads = {file: mapped(opened.enter_context(source.open(file))) for file in source.files}
    return {name: StoredTensor(info, loads[info.file]) for name, info in source.tensors.items() if held(info)}
