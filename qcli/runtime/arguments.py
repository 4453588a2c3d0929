"""The arguments of a CUDA kernel: the checks that ops make, and the packed buffer that the driver expects."""

import struct
from collections.abc import Callable, Sequence

import numpy as np
import torch

# The names that kernels/cuda/common.cuh uses.
TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half"}

_CODES = {"p": "P", "i": "i", "q": "q", "f": "f"}


def packer(signature: str) -> Callable[[Sequence], bytes]:
    """A function that packs arguments, each at a multiple of its own size. `signature` is described in `cuda.kernel`."""
    pointers = [i for i, letter in enumerate(signature) if letter == "p"]
    tables = [i for i, letter in enumerate(signature) if letter == "t"]
    layouts: dict[tuple[int, ...], struct.Struct] = {}

    def layout(sizes: tuple[int, ...]) -> struct.Struct:
        lengths = iter(sizes)
        # A table must begin at a multiple of 4 bytes, the size of its elements. struct aligns only numbers, hence the "0i".
        codes = (f"0i{next(lengths)}s" if letter == "t" else _CODES[letter] for letter in signature)
        return struct.Struct("@" + "".join(codes))

    def pack(arguments: Sequence) -> bytes:
        values = list(arguments)
        for i in pointers:
            if type(values[i]) is not int:
                values[i] = values[i].data_ptr()
        sizes = tuple([len(values[i]) for i in tables])
        if sizes not in layouts:
            layouts[sizes] = layout(sizes)
        return layouts[sizes].pack(*values)

    return pack


_tables: dict[tuple[int, torch.device], torch.Tensor] = {}


def table(values: np.ndarray, device: torch.device) -> torch.Tensor:
    """A table of codebooks.py on `device`. It is copied once and then kept."""
    key = (id(values), device)
    if key not in _tables:
        _tables[key] = torch.from_numpy(values).to(device)
    return _tables[key]


def type_name(op: str, x: torch.Tensor, name: str = "x") -> str:
    """The C++ name of x's dtype. Raises TypeError."""
    if x.dtype not in TYPES:
        raise TypeError(f"{op}: {name} is {x.dtype}, expected float32, bfloat16 or float16")
    return TYPES[x.dtype]


def require(op: str, name: str, tensor: torch.Tensor, dtype: torch.dtype, numel: int, device: torch.device) -> torch.Tensor:
    """The tensor, contiguous and aligned to 16 bytes. Raises ValueError unless it is on `device` and has that dtype and `numel`
    elements: a kernel checks none of this itself."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device}")
    if tensor.dtype != dtype or tensor.numel() != numel:
        raise ValueError(f"{op}: {name} has {tensor.numel()} elements of {tensor.dtype}, expected {numel} of {dtype}")
    return aligned(tensor)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, contiguous and with its start at a multiple of 16 bytes, which vector loads need."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
