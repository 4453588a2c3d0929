"""The context under rope scaling: how many tokens a model with scaled rotary positions was made for.

Files differ in what `max_position_embeddings` means when there is a scaling. For "linear" and "dynamic" it is the length before
scaling, as transformers documents it. For "yarn" it may be either; the larger of it and factor times the original length counts.
For "llama3" and "longrope" it is the extended length, unless it is no more than the original one. Where only some layers are
scaled (Gemma 3) it is the final length.
"""

import math

from qcli.errors import UsageError

_BEFORE_SCALING = ("linear", "dynamic", "yarn")
_AFTER_SCALING = ("llama3", "longrope", "su")
_LARGEST_FACTOR = 1_000_000


def extended(config, own: int | None) -> int | None:
    """Tokens, from `own`, the length that `config` (a ModelConfig) states. Raises UsageError for a bad factor."""
    rope = config.get("rope_scaling", "rope_parameters", default=None)
    if own is None or rope is None or config.get("rope_local_base_freq", default=None) is not None:
        return own
    if not isinstance(rope, dict):
        raise UsageError(f"rope_scaling in {config.label} is {rope!r}, expected an object.")
    sets = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return min(_extended(config, one, own) for one in sets)


def _extended(config, rope: dict, own: int) -> int:
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind not in (*_BEFORE_SCALING, *_AFTER_SCALING) or factor is None:
        return own
    if type(factor) not in (int, float) or not math.isfinite(factor) or not 0 < factor <= _LARGEST_FACTOR:
        raise UsageError(
            f"factor of rope_scaling in {config.label} is {factor!r}, expected a number above 0 and at most {_LARGEST_FACTOR:,}."
        )
    original = config.integer("original_max_position_embeddings", default=None)
    original = original or rope.get("original_max_position_embeddings") or own
    if type(original) is not int or original < 1:
        raise UsageError(f"original_max_position_embeddings in {config.label} is {original!r}, expected a whole number above 0.")
    if kind in _AFTER_SCALING and own > original:
        return own
    return max(own, int(original * factor))
