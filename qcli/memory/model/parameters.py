"""The parameters of a model, before there is a model: from config.json alone, from a checkpoint's headers, or from a size."""

import math
import re
from dataclasses import replace

from qcli.errors import UsageError
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families import families, shapes_of
from qcli.memory.model.headers import parameters_of
from qcli.memory.model.tensor_rules import Parameter, parameter

__all__ = ["Parameter", "from_size", "parameters", "parameters_of"]

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TIED_BELOW = 4e9  # parameters; Llama 3.2 ties its embeddings at 1B and 3B, its larger models do not
_VOCABULARY, _CONTEXT = 128_256, 131_072  # Llama 3.1's
_KV_HEADS = 8
_SLENDERNESS = 115  # hidden_size / layers: Llama 8B has 128, 70B has 102, 405B has 130


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter that transformers 5 builds from `config`, tied weights once.

    Raises UsageError for a family that is not known here and for a missing field.
    """
    shapes = shapes_of(config)
    if shapes is None:
        raise UsageError(
            f"{config.label}: the parameters of the model type {config.model_type!r} do not follow from its config alone here; "
            f"known are {', '.join(sorted(families()))}",
            "Give the folder or the hub id of a checkpoint in safetensors instead: its headers say it for any model.",
        )
    if config.text is not config.raw and not any("vision_tower" in name for name in shapes):
        config.assume(f"Only the language model of {config.label} is counted, not what reads images or sound.")
    found = [parameter(name, shape, config) for name, shape in shapes.items()]
    # transformers never converts the module of the last parameter, which it takes for the head's.
    found[-1] = replace(found[-1], quantizable=False)
    return found


def from_size(size: str) -> ModelConfig:
    """The config of a model like Llama 3 with about `size` parameters ("7B", "350M", "1.5T", "8e9"). Raises UsageError.

    Heads of 128 (64 in models less than 2048 wide), 8 key-value heads, an MLP of 3.5 widths, 128,256 tokens; what was chosen
    stands in `assumed`.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMBT]?)\s*", size, re.IGNORECASE)
    target = float(match[1]) * _SUFFIXES.get(match[2].upper(), 1) if match else 0
    if not 1e8 <= target <= 1e14:
        raise UsageError(f"the size is {size!r}, expected 100M to 100T parameters", "Write it as 7B, 350M or 1.5T.")
    tied = target < _TIED_BELOW
    widths = [512, 1024, 1536, *range(2048, 65536, 1024)]
    raw = min((_shape(width, target, tied) for width in widths), key=lambda raw: abs(_count(raw) / target - 1) + _oddness(raw))
    config = ModelConfig(raw, f"the shape of {size.strip()}")
    config.assume(
        f"{size.strip()} is taken for a model like Llama 3: {raw['num_hidden_layers']} layers of width {raw['hidden_size']:,}, "
        f"{raw['num_attention_heads']} heads, {raw['num_key_value_heads']} for keys and values, "
        f"an MLP of {raw['intermediate_size']:,}, {_VOCABULARY:,} tokens, "
        f"{'tied' if tied else 'untied'} embeddings: {_count(raw):,} parameters."
    )
    return config


def _shape(hidden: int, target: float, tied: bool) -> dict:
    """The shape of this width whose layers bring it nearest to `target` parameters."""
    heads = hidden // (128 if hidden >= 2048 else 64)
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": 0,
        "num_attention_heads": heads,
        "head_dim": hidden // heads,
        "num_key_value_heads": _KV_HEADS,
        "intermediate_size": hidden * 7 // 2,
        "vocab_size": _VOCABULARY,
        "max_position_embeddings": _CONTEXT,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
    }
    outside = _count(raw)
    a_layer = _count(raw | {"num_hidden_layers": 1}) - outside
    return raw | {"num_hidden_layers": max(1, round((target - outside) / a_layer))}


def _count(raw: dict) -> int:
    """Parameters of a Llama of this shape."""
    hidden, head_dim = raw["hidden_size"], raw["head_dim"]
    attention = 2 * hidden * head_dim * (raw["num_attention_heads"] + raw["num_key_value_heads"])
    layer = attention + 3 * hidden * raw["intermediate_size"] + 2 * hidden
    embeddings = (1 if raw["tie_word_embeddings"] else 2) * raw["vocab_size"] * hidden
    return raw["num_hidden_layers"] * layer + embeddings + hidden


def _oddness(raw: dict) -> float:
    """How far from common proportions a shape is, on the scale of a relative error in its size."""
    return 0.2 * abs(math.log(raw["hidden_size"] / raw["num_hidden_layers"] / _SLENDERNESS))
