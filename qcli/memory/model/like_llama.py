"""Models like Llama 3 that nobody has made: the one of a given size, and the largest for which there is room."""

import math
import re
from bisect import bisect_left
from collections.abc import Callable

from qcli.errors import UsageError
from qcli.memory.model.config import ModelConfig

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TIED_BELOW = 4e9  # parameters; Llama 3.2 ties its embeddings at 1B and 3B, its larger models do not
_VOCABULARY, _CONTEXT = 128_256, 131_072  # Llama 3.1's
_KV_HEADS = 8
_SLENDERNESS = 115  # hidden_size / layers: Llama 8B has 128, 70B has 102, 405B has 130
_SHORTEST, _TALLEST = 160, 64  # hidden_size / layers, between which `largest_llama` looks
_WIDTHS = (512, 1024, 1536, *range(2048, 65536, 1024))  # hidden_size of the models like Llama


def from_size(size: str) -> ModelConfig:
    """The config of a model like Llama 3 with about `size` parameters ("7B", "350M", "1.5T", "8e9"). Raises UsageError.

    It has heads of 128 (64 in models less than 2048 wide), 8 key-value heads, an MLP of 3.5 widths and 128,256 tokens. Its
    `assumed` names the shape.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([KMBT]?)\s*", size, re.IGNORECASE)
    target = float(match[1]) * _SUFFIXES.get(match[2].upper(), 1) if match else 0
    if not 1e8 <= target <= 1e14:
        raise UsageError(f"the size is {size!r}, expected 100M to 100T parameters", "Write it as 7B, 350M or 1.5T.")
    tied = target < _TIED_BELOW
    shapes = (_nearest(width, target, tied) for width in _WIDTHS)
    raw = min(shapes, key=lambda raw: abs(_count(raw) / target - 1) + _oddness(raw))
    config = ModelConfig(raw, f"the shape of {size.strip()}")
    config.assume(
        f"{size.strip()} is taken for a model like Llama 3: {shape_of(config)}, {_VOCABULARY:,} tokens, "
        f"{'tied' if tied else 'untied'} embeddings: {_count(raw):,} parameters."
    )
    return config


def largest_llama(fits: Callable[[ModelConfig], bool]) -> ModelConfig | None:
    """The largest config like Llama 3 for which `fits` is true; None where there is none. With one layer more it is false.

    A shape that is a few per cent smaller is preferred where its proportions are more common. `fits` must not be true of a model
    that is larger, in width or depth, than one that does not fit.
    """
    too_wide = bisect_left(_WIDTHS, True, key=lambda width: not fits(_config(_llama(width, max(1, round(width / _SLENDERNESS))))))
    near = _WIDTHS[max(0, too_wide - 3) : too_wide + 1]  # further ones are of odd proportions when they are as large
    deepest = [shape for width in near if (shape := _deepest(width, fits)) is not None]
    if not deepest:
        return None
    most = max(map(_count, deepest))
    return _config(min(deepest, key=lambda raw: 1 - _count(raw) / most + _oddness(raw)))


def shape_of(config: ModelConfig) -> str:
    """The shape of a config like Llama's, in words."""
    return (
        f"{config.layers} layers of width {config.hidden_size:,}, {config.heads} heads, {config.kv_heads} for keys and values, "
        f"an MLP of {config.intermediate_size:,}"
    )


def _deepest(hidden: int, fits: Callable[[ModelConfig], bool]) -> dict | None:
    """The shape of this width with the most layers that `fits`, in common proportions."""
    depths = range(max(1, hidden // _SHORTEST), hidden // _TALLEST + 1)
    count = bisect_left(depths, True, key=lambda layers: not fits(_config(_llama(hidden, layers))))
    return _llama(hidden, depths[count - 1]) if count else None


def _config(raw: dict) -> ModelConfig:
    return ModelConfig(raw, "a model like Llama 3")


def _nearest(hidden: int, target: float, tied: bool) -> dict:
    """The shape of this width whose layers bring it nearest to `target` parameters."""
    outside = _count(_shape(hidden, 0, tied))
    a_layer = _count(_shape(hidden, 1, tied)) - outside
    return _shape(hidden, max(1, round((target - outside) / a_layer)), tied)


def _llama(hidden: int, layers: int) -> dict:
    """The shape of this width and depth, tied where Llama 3 is."""
    untied = _shape(hidden, layers, tied=False)
    return _shape(hidden, layers, tied=True) if _count(untied) < _TIED_BELOW else untied


def _shape(hidden: int, layers: int, tied: bool) -> dict:
    heads = hidden // (128 if hidden >= 2048 else 64)
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
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


def _count(raw: dict) -> int:
    """Parameters of a Llama of this shape."""
    hidden, head_dim = raw["hidden_size"], raw["head_dim"]
    attention = 2 * hidden * head_dim * (raw["num_attention_heads"] + raw["num_key_value_heads"])
    layer = attention + 3 * hidden * raw["intermediate_size"] + 2 * hidden
    embeddings = (1 if raw["tie_word_embeddings"] else 2) * raw["vocab_size"] * hidden
    return raw["num_hidden_layers"] * layer + embeddings + hidden


def _oddness(raw: dict) -> float:
    """How far a shape is from common proportions, on the scale of a relative error in its size."""
    return 0.2 * abs(math.log(raw["hidden_size"] / raw["num_hidden_layers"] / _SLENDERNESS))
