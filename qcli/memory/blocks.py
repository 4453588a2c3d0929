"""A model's parameters as the blocks that a device map moves: the embedding, each layer, the final norm with the head."""

import math
from collections.abc import Mapping

from qcli.memory.opening import Model
from qcli.memory.split import Block
from qcli.memory.weights import weights

_COUNTED_BITS = {"llm-int8": 8, "nf4": 4, "nf4-plain": 4, "fp4": 4}  # of a quantized weight, scales aside
_ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def blocks_of(model: Model, method: str, dtype: str, state: Mapping[int, int] | None = None) -> list[Block]:
    """The blocks in the order of the forward pass. `state` is bytes of cache and the like by layer of the (decoder's) stack."""
    groups: dict[tuple[int, int], list] = {}
    for parameter in model.parameters:
        groups.setdefault(_key(parameter), []).append(parameter)
    groups.setdefault(_LAST, [])
    tied = model.config.tied_embeddings
    found = []
    for key in sorted(groups):
        held = groups[key]
        found.append(
            Block(
                name=_name(key),
                weights=weights(held, method, dtype).total if held else 0,
                counted=sum(_counted(parameter, method, dtype) for parameter in held),
                state=(state or {}).get(key[1], 0) if key[0] == _STACK else 0,
                with_first=key == _LAST and tied,
            )
        )
    return found


_STACK = 2
_FIRST, _LAST = (0, 0), (3, 0)


def _key(parameter) -> tuple[int, int]:
    if parameter.layer is None:
        return _FIRST if parameter.kind == "embedding" else _LAST
    return (1 if parameter.name.startswith("encoder.") else _STACK, parameter.layer)


def _name(key: tuple[int, int]) -> str:
    return {0: "embedding", 1: f"encoder layer {key[1]}", 2: f"layer {key[1]}", 3: "head"}[key[0]]


def _counted(parameter, method: str, dtype: str) -> int:
    count = math.prod(parameter.shape)
    if parameter.quantizable and method in _COUNTED_BITS:
        return count * _COUNTED_BITS[method] // 8
    return count * _ITEMSIZE[dtype]
