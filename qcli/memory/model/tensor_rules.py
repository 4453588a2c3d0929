"""What follows from a parameter's name and shape: its kind, its layer, and how transformers 5 treats it.

The same rules serve both sources of parameters: the shapes of `families` and the headers of a checkpoint.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import prod

from qcli.checkpoint.names import EMBEDDINGS, HEADS, NORM
from qcli.memory.model.config import ModelConfig

KINDS = ("embedding", "attention", "ffn", "experts", "router", "norm", "head", "other")

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_PART = re.compile(r"(?:^|\.)(?:vision\w*|visual|vit|image\w*|audio\w*|multi_modal_projector|mm_projector|connector)(?:\.|$)")
_EXPERT = re.compile(r"(?:^|\.)experts(?:\.|$)")
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_ATTENTION = re.compile(r"attn|attention|mamba|mixer|time_mix|temporal_block|qkv|[qkvo]_proj$|short_conv", re.IGNORECASE)
_FFN = re.compile(r"mlp|ffn|feed_?forward|shared_expert|DenseReluDense|^fc|channel_mix|^(?:gate|up|down|gate_up)_proj$")
_NOT_LINEAR = re.compile(r"conv|relative_attention_bias|position_bias|_embed\w*$|^embed|^probe$")
# The output projection of torch's MultiheadAttention has a Linear class of its own, since its weight is read without calling it.
_NO_PLAIN_LINEAR = re.compile(r"vision_tower\.(?:vision_model\.)?head\.attention\.out_proj$")

# transformers' Conv1D: a linear layer whose weight is stored [in_features, out_features].
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
# Their layers are subclasses of nn.Linear. transformers compares types, and leaves subclasses alone.
_LINEAR_SUBCLASSES = {"falcon"}
# `_keep_in_fp32_modules` of the models. These stay float32 under float16, and are never quantized.
_KEEP_FP32 = {"gpt_oss": re.compile("norm"), **dict.fromkeys(("t5", "mt5", "umt5"), re.compile("wo"))}


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model that transformers builds.

    shape       as the model holds it; [1, count] of a quantized weight whose shape is not known.
    kind        one of KINDS.
    layer       index of its block in its stack; None outside of one. T5 has two stacks, named encoder and decoder.
    linear      whether it is the weight of a linear layer, quantized or not.
    quantizable whether transformers 5 with bitsandbytes converts it: not the head, not fused experts, not `keep_fp32`.
    keep_fp32   whether it stays float32 when the model is loaded in float16. Under bfloat16 it becomes bfloat16.
    transposed  whether it is stored [in_features, out_features].
    scheme      how a checkpoint stores it, if not in plain 16 or 32 bits: "nf4", "llm-int8", "gptq", "F8_E4M3"...
    stored      bytes that a loaded model holds of what a checkpoint stores for it, companions (absmax, scales, zero points)
                included; None without a checkpoint.
    head_bits   bits of an output head that is quantized, or of the embedding that is the head; None for all else.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    layer: int | None
    quantizable: bool
    keep_fp32: bool
    linear: bool = False
    transposed: bool = False
    scheme: str | None = None
    stored: int | None = None
    head_bits: int | None = None

    @property
    def numel(self) -> int:
        """Elements. Those of a stored quantized weight are the ones that it stands for."""
        return prod(self.shape)

    @property
    def out_features(self) -> int:
        """Rows of a linear layer's weight as [out_features, in_features]. Its int8 form has a scale for each."""
        return self.shape[-1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of that weight."""
        return self.numel // max(self.out_features, 1)


def with_head(parameters: Sequence[Parameter], bits: int) -> list[Parameter] | None:
    """The parameters with an output head of `bits`; the embedding is the head where there is no other. None without either."""
    of_head = [p for p in parameters if p.kind == "head" and len(p.shape) == 2]
    embeddings = [p for p in parameters if p.kind == "embedding" and len(p.shape) == 2]
    found = of_head or sorted(embeddings, key=lambda p: p.numel)[-1:]
    return [replace(p, head_bits=bits) if p in found else p for p in parameters] if found else None


def parameter(
    name: str, shape: tuple[int, ...], config: ModelConfig, scheme: str | None = None, stored: int | None = None
) -> Parameter:
    """The Parameter of this name and shape in the model of `config`, by the rules."""
    cube = len(shape) == 3 and min(shape) > 1
    kind, linear, keep_fp32 = _judge(_NUMBER.sub(".#", name), len(shape), cube, config.model_type)
    return Parameter(
        name=name,
        shape=tuple(shape),
        kind=kind,
        layer=layer_of(name),
        quantizable=linear and not keep_fp32 and config.model_type not in _LINEAR_SUBCLASSES,
        keep_fp32=keep_fp32,
        linear=linear,
        transposed=linear and config.model_type in _CONV1D_MODELS,
        scheme=scheme,
        stored=stored,
    )


def layer_of(name: str) -> int | None:
    """The index of the block to which a parameter belongs. See Parameter.layer."""
    number = _NUMBER.search(name)
    return int(number[0][1:]) if number and not _PART.search(name) else None


@cache  # a model has a few dozen such names, however many layers and experts
def _judge(name: str, dimensions: int, cube: bool, model_type: str) -> tuple[str, bool, bool]:
    """kind, linear and keep_fp32 of a parameter. Its name has # in place of numbers. `cube`: three dimensions, none of them 1."""
    kind = _kind(name, cube)
    module, _, end = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    linear = (
        dimensions == 2
        and end == "weight"
        and kind in ("attention", "ffn", "router", "other")
        and (kind != "router" or leaf == "shared_expert_gate")  # the other routers are bare parameters, not Linear
        and not _NOT_LINEAR.search(leaf)
        and leaf not in EMBEDDINGS
        and not _NO_PLAIN_LINEAR.search(module)
    )
    keeps = _KEEP_FP32.get(model_type)
    return kind, linear, bool(keeps and keeps.search(name))


def _kind(name: str, cube: bool) -> str:
    """One of KINDS. All that mixes tokens is "attention", Mamba and DeltaNet too. Towers for images or sound are "other"."""
    if _PART.search(name):
        return "other"
    parts = [part for part in name.split(".") if part != "#"]
    leaf = parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]
    if NORM.search(leaf):
        return "norm"
    if _EXPERT.search(name) or (cube and "conv" not in name):
        return "experts"
    if leaf in _ROUTERS or "router" in parts or parts[-1] == "e_score_correction_bias":
        return "router"
    if leaf in EMBEDDINGS:
        return "embedding"
    if leaf in HEADS and "#" not in name:
        return "head"
    if any(_ATTENTION.search(part) for part in parts):
        return "attention"
    return "ffn" if any(_FFN.search(part) for part in parts) else "other"
