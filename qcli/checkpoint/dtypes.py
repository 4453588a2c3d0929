"""Dtypes: the codes of safetensors, torch's names, sizes. torch is imported only when a torch.dtype is asked for."""

from dataclasses import dataclass
from math import prod

TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
CODES = {name: code for code, name in TORCH_NAMES.items()}
MODEL_DTYPES = ("bfloat16", "float16", "float32")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # bfloat16 represents all of their values exactly
FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
# Every dtype of the safetensors format. Some are smaller than a byte; torch has no dtype for those.
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E8M0", *FLOAT8), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
ITEMSIZE = {code: DTYPE_BITS[code] // 8 for code in TORCH_NAMES}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor before its data exist: full name, safetensors dtype code, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def torch_dtype(code: str):
    """The torch.dtype of a safetensors code. Raises KeyError where torch has none."""
    import torch

    return getattr(torch, TORCH_NAMES[code])
