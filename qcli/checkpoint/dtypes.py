"""The names a dtype goes by: safetensors' code, torch's name. torch is imported only where tensors are."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip
CODES = {name: code for code, name in TORCH_NAMES.items()}
MODEL_DTYPES = ("bfloat16", "float16", "float32")
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # every value of which bfloat16 holds exactly
FLOATS = ("F64", "F32", "F16", "BF16", *FLOAT8)
ITEMSIZE = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E8M0": 1, **dict.fromkeys(FLOAT8, 1),
}  # fmt: skip


def torch_dtype(code: str):
    """The torch.dtype of a safetensors code. Raises KeyError for one that torch has no dtype for."""
    import torch

    return getattr(torch, TORCH_NAMES[code])
