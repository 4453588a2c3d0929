"""A model whose attention reads keys and values as an int8 cache holds them: what `generate --kv-dtype 8` costs."""

import sys
from collections import Counter

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qcli.errors import UsageError
from qcli.ops.rope_append import quantized


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x [..., head_dim] with each row rounded to int8 and its scale, absmax / 127."""
    values, scale = quantized(x.float())
    return (values * scale.unsqueeze(-1)).to(x.dtype)


def round_cache(model) -> Counter:
    """Makes all attention of a transformers model round its keys and values first. Returns what counts its calls, under "calls".

    A model whose attention does not ask transformers' interfaces stays as it is, and makes no calls. Raises UsageError for one that
    has another kind of attention.
    """
    base = getattr(model.config, "_attn_implementation", None)
    if base not in ("sdpa", "eager"):
        raise UsageError(f"--kv-dtype 8: the attention of {type(model).__name__} is {base!r}, expected sdpa or eager")

    counter: Counter = Counter()

    def attention(module, query, key, value, *arguments, **options):
        counter["calls"] += 1
        attend = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
        return attend(module, query, rounded(key), rounded(value), *arguments, **options)

    name = f"qcli_int8_cache_{base}_{id(counter)}"  # each model has a counter of its own
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    model.set_attn_implementation(name)
    return counter
