"""What the name of a tensor or module says of it. A new architecture with new names is an edit of this file alone.

memory/model/tensor_rules.py goes further for the architectures that it knows: which parameters a model has, and what each costs.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

EMBEDDINGS = {
    "embed_tokens",
    "wte",
    "wpe",
    "shared",
    "embed_in",
    "embed_positions",
    "word_embeddings",
    "word_embedding",
    "tok_embeddings",
    "embeddings",
    "embedding",
    "position_embedding",
    "position_embeddings",
    "tokens_embed",
    "positions_embed",
    "embed_tokens_per_layer",
    "token_type_embeddings",
}  # outside of the layers
HEADS = {"lm_head", "embed_out", "output_layer", "output", "head", "score", "classifier"}  # outside of the layers too
NORM = re.compile(r"norm|(?:^|_)ln(?:_|\d|f?$)", re.IGNORECASE)  # of the last part of a module's name

_NUMBERED = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")
_GAIN = (".weight", ".gamma", ".scale")
# Llama, OPT and Phi, GPT-NeoX and BLOOM and Falcon, GPT-J, GPT-2 and StarCoder2, T5, BERT, and the experts of Mixtral.
_DOWN = re.compile(r"(?:^|[._])(?:down_proj|fc2|dense_4h_to_h|fc_out|c_proj|wo|output\.dense|w2)$")
# Narrower than the "attention" of memory, where all that mixes tokens counts: Mamba has no attention to look for outliers in.
_ATTENTION = re.compile(r"att")
_FFN = re.compile(r"mlp|ffn|feed_?forward|expert|moe|(^|\.)(fc\d?|dense_h_to_4h|dense_4h_to_h|up_proj|gate_proj|down_proj|w[123])$")
# Wider than EMBEDDINGS and HEADS, which are exact: here the architecture is not known, and what is left as it is loses nothing.
_NOT_LINEAR = re.compile(
    r"(?:^|[._])(?:embed\w*|emb|output_layer|head|score|classifier|router|gate)$|embedding|relative_attention_bias|conv1d"
)


@dataclass(frozen=True)
class Place:
    """`stack` is what comes before the first number of a name, `layer` that number, `kind` the rest, with other numbers as `#`."""

    stack: str
    layer: int | None
    kind: str


def place(name: str) -> Place:
    """The place of a module; `layer` is None outside of the layers."""
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


def module_kind(tensor: str) -> str:
    """What tables group tensors by: q_proj, down_proj, embed_tokens, input_layernorm, ..."""
    parts = [p for p in tensor.split(".") if not p.isdigit()]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def may_be_linear(module: str) -> bool:
    """Whether a module of an unknown architecture with a 2-D weight may be a linear layer to quantize, by its name: it is no
    embedding, head, norm or router."""
    leaf = _leaf(module)
    outside = place(module).layer is None and (leaf in EMBEDDINGS or leaf in HEADS)
    return not (outside or NORM.search(leaf) or _NOT_LINEAR.search(module))


def gain_of(tensor: str) -> str | None:
    """The norm whose gain a 1-D tensor of this name is, else None."""
    module = next((tensor.removesuffix(end) for end in _GAIN if tensor.endswith(end)), None)
    return module if module and NORM.search(_leaf(module)) else None


def is_down_projection(module: str) -> bool:
    """Whether a linear module is the last of an FFN, by the names that models give it."""
    return bool(_DOWN.search(module)) and "att" not in module.lower()


def in_attention(path: str) -> bool:
    """Whether a linear module belongs to an attention, by its path in the block."""
    return bool(_ATTENTION.search(path)) and not in_ffn(path)


def in_ffn(path: str) -> bool:
    """Whether a linear module belongs to an FFN, by its path in the block."""
    return bool(_FFN.search(path)) and not _ATTENTION.search(path.rpartition(".")[0])


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
