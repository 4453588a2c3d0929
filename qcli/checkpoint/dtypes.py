"""The names a dtype goes by: safetensors' code, torch's name. torch is imported only where tensors are."""

TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
CODES = {name: code for code, name in TORCH_NAMES.items()}
MODEL_DTYPES = ("bfloat16", "float16", "float32")
FLOATS = ("F64", "F32", "F16", "BF16")
ITEMSIZE = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def torch_dtype(code: str):
    """The torch.dtype of a safetensors code."""
    import torch

    return getattr(torch, TORCH_NAMES[code])
