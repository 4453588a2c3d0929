"""What the name of a tensor or module says of it: its layer, what it is there, whether it is a norm's gain or an FFN's end."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")
_NORM = re.compile(r"norm|^ln(?:$|_|\d|f$)")
_GAIN = (".weight", ".gamma", ".scale")
# Llama, OPT and Phi, GPT-NeoX and BLOOM and Falcon, GPT-J, GPT-2 and StarCoder2, T5, BERT, and the experts of Mixtral.
_DOWN = re.compile(r"(?:^|[._])(?:down_proj|fc2|dense_4h_to_h|fc_out|c_proj|wo|output\.dense|w2)$")


@dataclass(frozen=True)
class Place:
    """`stack` is what comes before the first number of a name, `layer` that number, `kind` the rest, other numbers as `#`."""

    stack: str
    layer: int | None
    kind: str


def place(name: str) -> Place:
    """The place of a module; `layer` is None for what lies outside of the layers."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return Place("", None, name)
    return Place(match[1] or "", int(match[2]), re.sub(r"\b\d+\b", "#", match[3]))


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has."""
    counts: dict[str, int] = {}
    for at in map(place, names):
        if at.layer is not None:
            counts[at.stack] = max(counts.get(at.stack, 0), at.layer + 1)
    return counts


def gain_of(tensor: str) -> str | None:
    """The norm whose gain a 1-D tensor of this name is, else None."""
    module = next((tensor.removesuffix(end) for end in _GAIN if tensor.endswith(end)), None)
    return module if module and _NORM.search(module.rpartition(".")[2].lower()) else None


def is_down_projection(module: str) -> bool:
    """Whether a linear module is the last of an FFN, by the names that models give it."""
    return bool(_DOWN.search(module)) and "att" not in module.lower()
