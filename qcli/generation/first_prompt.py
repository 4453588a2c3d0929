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
    """What the layers of a model got and gave, for the last MOST_TOKENS tokens: inputs, attended (what attention gave) and outputs
    [1, tokens, hidden_size]; and where the angles of each layer came from: (a rotary module, further arguments), or None."""

    def __init__(self, count: int):
        self.inputs, self.attended, self.outputs, self.ropes = ([None] * count for _ in range(4))
        self.angles: list[tuple[nn.Module, tuple, object]] = []  # rotary module, further arguments, its (cos, sin)


@contextmanager
def watching(decoder: nn.Module, layers: nn.ModuleList, attention: list[nn.Module]) -> Iterator[Seen]:
    """What happens in `layers` of `decoder` meanwhile. `attention` has the attention module of each layer."""
    seen, hooks = Seen(len(layers)), []

    def turned(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
        seen.angles.append((module, args[2:] or tuple(v for k, v in kwargs.items() if k not in ("x", "position_ids")), output))

    def before(i: int, args: tuple, kwargs: dict) -> None:
        seen.inputs[i] = _last(args[0] if args else kwargs.get("hidden_states"))
        angles = kwargs.get("position_embeddings")
        if angles is not None:
            found = [(module, more) for module, more, output in seen.angles if output is angles or output[0] is angles[0]]
            seen.ropes[i] = found[-1] if found else (None, ())

    def note(place: list, i: int, output) -> None:
        place[i] = _last(output[0] if isinstance(output, tuple) else output)

    try:
        for name, module in decoder.named_children():
            if "rotary" in name:
                hooks.append(module.register_forward_hook(turned, with_kwargs=True))
        for i, layer in enumerate(layers):
            hooks.append(layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True))
            hooks.append(layer.register_forward_hook(lambda _, __, output, i=i: note(seen.outputs, i, output)))
            hooks.append(attention[i].register_forward_hook(lambda _, __, output, i=i: note(seen.attended, i, output)))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _last(x: object) -> torch.Tensor | None:
    """None for what is no tensor of tokens: such a layer is not known."""
    return x[:, -MOST_TOKENS:].clone() if isinstance(x, torch.Tensor) and x.dim() == 3 else None
