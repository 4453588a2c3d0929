"""Bytes of the parameters of a quantized checkpoint, by what its format stores, where only the config.json is there."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from qcli.checkpoint.dtypes import ITEMSIZE
from qcli.errors import UsageError
from qcli.formats import Weight, stored_tensors
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.tensor_rules import Parameter
from qcli.schemes import NAMED

_FP8_BLOCK = (128, 128)  # rows and columns that share a float32 scale, by default of transformers' FineGrainedFP8Config
_MXFP4_GROUP, _MXFP4_BYTES = 32, 17  # elements of a group; the bytes of their codes and of their one-byte scale
_SKIPPED = ("modules_to_not_convert", "llm_int8_skip_modules")


def as_stored(parameters: Sequence[Parameter], config: ModelConfig) -> list[Parameter]:
    """`parameters` with the scheme and the bytes that `config.quantization` gives each: bitsandbytes, fp8, mxfp4.

    Raises UsageError for any other quant_method: its bytes need the headers of the checkpoint.
    """
    quantization = config.quantization
    method = quantization.get("quant_method")
    rule = {"bitsandbytes": _bitsandbytes, "fp8": _fp8, "mxfp4": _mxfp4}.get(method)
    if rule is None:
        raise UsageError(
            f"{config.label} is of a model quantized by {method}, and qcli cannot count the bytes of that from the config alone",
            "Give the folder or the hub id of the checkpoint in safetensors instead, or the config of the original model.",
        )
    skipped = [_pattern(name) for field in _SKIPPED for name in quantization.get(field) or ()]
    found = []
    for one in parameters:
        kept = any(pattern.search(one.name) for pattern in skipped)
        stored = None if kept else rule(one, quantization, config)
        found.append(one if stored is None else replace(one, scheme=stored[0], stored=stored[1]))
    return found


def _pattern(module: str) -> re.Pattern[str]:
    name = ".*".join(re.escape(part) for part in str(module).split("*"))
    return re.compile(rf"(?:^|\.){name}(?:\.|$)")


def _bitsandbytes(one: Parameter, quantization: Mapping, config: ModelConfig) -> tuple[str, int] | None:
    if not one.quantizable:
        return None
    name = quantization.get("bnb_4bit_quant_type") or "fp4"
    if quantization.get("load_in_8bit"):
        name = "llm-int8"
    elif name not in ("nf4", "fp4"):
        raise UsageError(f"bnb_4bit_quant_type in {config.label} is {name!r}, expected nf4 or fp4.")
    elif not quantization.get("bnb_4bit_use_double_quant"):
        name += "-plain"
    _, resident = stored_tensors(NAMED[name], Weight("weight", one.out_features, one.in_features, "BF16"))
    return name, sum(spec.nbytes for spec in resident)


def _fp8(one: Parameter, quantization: Mapping, config: ModelConfig) -> tuple[str, int] | None:
    """Linear layers and experts: a byte for each weight, and a scale for each block."""
    if not (one.quantizable or (one.kind == "experts" and len(one.shape) == 3)):
        return None
    block = quantization.get("weight_block_size", _FP8_BLOCK)
    if not (isinstance(block, Sequence) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UsageError(f"weight_block_size in {config.label} is {block!r}, expected two whole numbers such as [128, 128].")
    *experts, rows, columns = one.shape
    scales = prod(experts) * -(-rows // block[0]) * -(-columns // block[1])
    return "fp8", ITEMSIZE["F8_E4M3"] * one.numel + ITEMSIZE["F32"] * scales


def _mxfp4(one: Parameter, quantization: Mapping, config: ModelConfig) -> tuple[str, int] | None:
    """Experts alone: groups of 32 along the inputs, as in gpt-oss."""
    if one.kind != "experts" or len(one.shape) != 3:
        return None
    return "mxfp4", -(-one.numel // _MXFP4_GROUP) * _MXFP4_BYTES
