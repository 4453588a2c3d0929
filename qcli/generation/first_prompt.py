"""What the lean step takes from transformers' run of a prompt: keys and values, and what each layer got and gave."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin

from qcli.generation.lean_step import MOST_TOKENS


class Storing(CacheLayerMixin):
    """Stores the keys and values of a prompt in the step's own cache. A prompt attends to its own keys and values."""

    is_compileable, is_sliding = False, False

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__):
        self.layer.store(key_states[0], value_states[0])
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


class Seen:
    """What the layers of a model got and gave, for the last MOST_TOKENS tokens: inputs, outputs [1, tokens, hidden_size]; rope."""

    def __init__(self, count: int):
        self.inputs, self.outputs, self.rope = ([None] * count for _ in range(3))


@contextmanager
def watching(layers: nn.ModuleList) -> Iterator[Seen]:
    seen, hooks = Seen(len(layers)), []

    def before(i: int, args: tuple, kwargs: dict) -> None:
        seen.inputs[i] = (args[0] if args else kwargs["hidden_states"])[:, -MOST_TOKENS:].clone()
        seen.rope[i] = kwargs.get("position_embeddings")

    def after(i: int, output) -> None:
        seen.outputs[i] = (output[0] if isinstance(output, tuple) else output)[:, -MOST_TOKENS:].clone()

    for i, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda _, __, output, i=i: after(i, output)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
