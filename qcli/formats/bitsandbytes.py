"""The on-disk format of bitsandbytes, as transformers 4 and 5 read and write it.

4-bit, for a weight P of logical shape [out_features, in_features], flattened row-major:
  P                                    U8  [ceil(n/2), 1]      two codes a byte, the first in the high nibble
  P.absmax                             F32 or U8 [blocks]      U8 codes under double quantization
  P.quant_map                          F32 [16]                the codebook
  P.nested_absmax, P.nested_quant_map  F32 [ceil(blocks/256)], F32 [256]   with double quantization only
  P.quant_state.bitsandbytes__TYPE     U8  [length]            UTF-8 JSON
8-bit: P I8 [out_features, in_features], SCB F32 [out_features] (row absmax), weight_format U8 [] = 0 ("row").
"""

import json

from qcli.checkpoint.dtypes import TensorSpec

NESTED_BLOCK_SIZE = 256
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# JSON ends at its closing brace, so blanks after it are free: they hold a place for the longest float there is, and the
# length of the blob is known before the offset is.
_LONGEST_FLOAT = len("-2.2250738585072014e-308")


def quant_state(quant_type: str, block_size: int, dtype: str, shape: tuple[int, int], nested_offset: float | None) -> bytes:
    """The quant_state JSON of one weight; `dtype` is the safetensors code of what was quantized."""
    state = {"quant_type": quant_type, "blocksize": block_size, "dtype": TORCH_NAMES[dtype], "shape": list(shape)}
    if nested_offset is None:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": nested_offset}
    text = json.dumps(state)
    return text.ljust(len(text) - len(json.dumps(nested_offset)) + _LONGEST_FLOAT).encode()


def outputs_4bit(
    weight: str, shape: tuple[int, int], quant_type: str, block_size: int, double_quant: bool, dtype: str
) -> list[TensorSpec]:
    """Every tensor that is stored for a 4-bit `weight` of `shape`."""
    count = shape[0] * shape[1]
    blocks = -(-count // block_size)
    state = quant_state(quant_type, block_size, dtype, shape, 0.0 if double_quant else None)
    specs = [
        TensorSpec(weight, "U8", (-(-count // 2), 1)),
        TensorSpec(f"{weight}.absmax", "U8" if double_quant else "F32", (blocks,)),
        TensorSpec(f"{weight}.quant_map", "F32", (16,)),
        TensorSpec(f"{weight}.quant_state.bitsandbytes__{quant_type}", "U8", (len(state),)),
    ]
    if double_quant:
        specs.append(TensorSpec(f"{weight}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK_SIZE),)))
        specs.append(TensorSpec(f"{weight}.nested_quant_map", "F32", (256,)))
    return specs


def outputs_8bit(weight: str, shape: tuple[int, int]) -> list[TensorSpec]:
    """Every tensor that is stored for an int8 `weight` of `shape`."""
    module = weight.removesuffix("weight")
    return [
        TensorSpec(weight, "I8", shape),
        TensorSpec(f"{module}SCB", "F32", (shape[0],)),
        TensorSpec(f"{module}weight_format", "U8", ()),
    ]


def quantization_config(
    *,
    bits: int,
    skip_modules: list[str] | None,
    compute_dtype: str,
    quant_type: str = "fp4",
    double_quant: bool = False,
    threshold: float = 6.0,
) -> dict[str, object]:
    """The `quantization_config` of config.json, with the fields that transformers writes.

    `compute_dtype` is a torch name. The threshold must be a JSON float: transformers refuses an integer. For 8 bits the
    4-bit fields hold transformers' defaults.
    """
    return {
        "_load_in_4bit": bits == 4,
        "_load_in_8bit": bits == 8,
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip_modules,
        "llm_int8_threshold": float(threshold),
        "load_in_4bit": bits == 4,
        "load_in_8bit": bits == 8,
        "quant_method": "bitsandbytes",
    }
