"""What a decoder layer of a transformers model computes, read from its modules: norms, attention, gated or plain MLP.

Nothing here knows a model's name. Modules are found by the names that transformers gives to them in many models. Norms and
activations are recognised by what they compute. Where more than one reading is possible, `candidates` gives all of them; the lean
step (lean_step.py) tries each against the layer itself. Whatever is not recognised raises Unsupported.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from qcli.generation.step import Unsupported
from qcli.ops.activate import KINDS, activate
from qcli.ops.norm import norm

# Which values of a head are rotated together, and how the tables of angles lie: pairs (i, i + n / 2); pairs (2 i, 2 i + 1) with
# tables that lie alike; such pairs with tables of two equal halves; no rotation.
ROPES = ("halves", "interleaved", "interleaved by halves", None)


@dataclass(frozen=True)
class Norm:
    """RMS or layer norm of the last dimension: the arguments of the op `norm`, weight and bias float32."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    centered: bool


@dataclass(frozen=True)
class Attention:
    """`projections` maps what a product of the input yields to its weight: "q", "k", "v", or "qkv" for all three at once."""

    projections: dict[str, object]
    out: object
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    q_norm: Norm | None
    k_norm: Norm | None
    norm_per_head: bool
    softcap: float
    rope: str | None
    by_head: bool = False  # q, k and v of "qkv" alternate from head to head, as in GPT-NeoX


@dataclass(frozen=True)
class Mlp:
    """down(act(gate) up), or down(act(gate)) without `up`; "gate_up" yields both at once."""

    projections: dict[str, object]
    down: object
    act: str
    width: int


@dataclass(frozen=True)
class Block:
    """A decoder layer. `attention_in` is the norm before attention, `attention_out` that of its result; likewise for the MLP.

    In a parallel block both read the block's input; without an `mlp_in` of its own the MLP then shares attention's norm.
    """

    attention: Attention
    mlp: Mlp
    attention_in: Norm | None
    attention_out: Norm | None
    mlp_in: Norm | None
    mlp_out: Norm | None
    parallel: bool
    factor: float  # multiplies what attention and the MLP add to the residual stream


# Layers with norms of what attention and the MLP yield: the name of each norm, and its place in a Block.
_BY_NAME = (
    {
        "input_layernorm": "attention_in",
        "post_attention_layernorm": "attention_out",
        "pre_feedforward_layernorm": "mlp_in",
        "post_feedforward_layernorm": "mlp_out",
    },
    {
        "input_layernorm": "attention_in",
        "post_self_attn_layernorm": "attention_out",
        "post_attention_layernorm": "mlp_in",
        "post_mlp_layernorm": "mlp_out",
    },
    {"post_attention_layernorm": "attention_out", "post_feedforward_layernorm": "mlp_out"},
)
_ATTENTION, _MLP = ("self_attn", "attention", "attn"), ("mlp", "feed_forward")
# Settings whose effect depends on positions or magnitudes that a short prompt does not reach.
_UNSEEN = ("clip_qkv", "llama_4_scaling_beta", "attn_temperature_tuning", "attention_chunk_size")


def attention_of(layer: nn.Module) -> nn.Module:
    """The attention module of a layer. Raises Unsupported if there is none."""
    return _child(layer, *_ATTENTION)


def check_config(config) -> None:
    """Raises Unsupported for a setting that the comparison on a short text cannot see."""
    rope = getattr(config, "rope_parameters", None) or {}
    sets = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    for name in _UNSEEN:
        if getattr(config, name, None) or any(each.get(name) for each in sets):
            raise Unsupported


def candidates(layer: nn.Module, config, linear: Callable) -> Iterator[Block]:
    """Every reading of a layer, the likeliest first. `linear` prepares a linear layer. Raises Unsupported if there is none."""
    attention = _attention(attention_of(layer), config, linear)
    mlp = _mlp(_child(layer, *_MLP), linear)
    width = attention.out.out_features
    given = {
        name: norm_of(module, width)
        for name, module in layer.named_children()
        if "norm" in name or name.startswith("ln_") or name == "ln1" or name == "ln2"
    }
    others = {name for name, child in layer.named_children() if name not in given and not isinstance(child, nn.Dropout)}
    if not others <= {*_ATTENTION, *_MLP}:
        raise Unsupported
    factor = float(getattr(layer, "residual_multiplier", 1.0))
    for norms, rope in itertools.product(_places(given, layer), ROPES):
        yield Block(replace(attention, rope=rope), mlp, **norms, factor=factor)


def _places(given: dict[str, Norm], layer: nn.Module) -> list[dict]:
    """Where the norms of a layer may stand."""
    names = list(given)
    none: dict[str, object] = {"attention_in": None, "attention_out": None, "mlp_in": None, "mlp_out": None, "parallel": False}
    for by_name in _BY_NAME:
        if set(names) == set(by_name):
            return [none | {by_name[name]: each for name, each in given.items()}]
    if len(names) == 2:
        placed = none | {"attention_in": given[names[0]], "mlp_in": given[names[1]]}
        parallel = getattr(layer, "use_parallel_residual", False)
        return [placed | {"parallel": parallel}, placed | {"parallel": not parallel}]
    if len(names) == 1:
        return [none | {"attention_in": given[names[0]], "parallel": True}]
    raise Unsupported


def _child(module: nn.Module, *names: str) -> nn.Module:
    """The child with one of the names. Raises Unsupported if there is none."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    raise Unsupported


def norm_of(module: nn.Module, width: int) -> Norm:
    """A norm of `width` values, recognised by what it computes in float32. Raises Unsupported for anything else."""
    if list(module.children()) or not set(dict(module.named_parameters())) <= {"weight", "bias"}:
        raise Unsupported
    own = [getattr(module, name, None) for name in ("weight", "bias")]
    weight, bias = (None if x is None else x.detach().float().cpu() for x in own)
    if any(x is not None and x.shape != (width,) for x in (weight, bias)):
        raise Unsupported
    eps = next((value for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None)) is not None), None)
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0)) + 0.3
    x[1] *= 30
    x[2] *= 1e-3  # where eps counts
    try:
        expected = copy.deepcopy(module).cpu().float()(x)
    except Exception as e:
        raise Unsupported from e
    weights = [weight] if weight is None else [weight, weight + 1]
    for centered, each in itertools.product((False, True), weights):
        for found in (1e-5, torch.finfo(torch.float32).eps) if eps is None else (eps,):
            y, _ = norm(x, None, each, bias, found, centered)
            if y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-4, atol=1e-5):
                return Norm(each if each is None else each.contiguous(), bias, float(found), centered)
    raise Unsupported


def _activation(module) -> str:
    """The kind of op `activate` that a function computes."""
    x = torch.linspace(-9, 9, 721)
    try:
        expected = module(x)
    except Exception as e:
        raise Unsupported from e
    for kind in KINDS:
        if torch.allclose(activate(x, None, kind), expected, rtol=1e-5, atol=2e-6):
            return kind
    raise Unsupported


def _attention(module: nn.Module, config, linear: Callable) -> Attention:
    names = {name for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
    out_name = next((name for name in ("o_proj", "dense", "c_proj", "out_proj") if name in names), None)
    whole = next((name for name in ("qkv_proj", "query_key_value", "c_attn") if name in names), None)
    separate = names >= {"q_proj", "k_proj", "v_proj"}
    norms = {name for name in names if name in ("q_norm", "k_norm", "q_layernorm", "k_layernorm")}
    known = norms | {out_name, whole} | ({"q_proj", "k_proj", "v_proj"} if separate else set()) | {"rotary_emb"}
    if out_name is None or separate == bool(whole) or not names <= known:
        raise Unsupported
    out = linear(getattr(module, out_name))
    heads = config.num_attention_heads
    head_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if separate:
        projections = {part: linear(getattr(module, f"{part}_proj")) for part in "qkv"}
        heads, kv_heads = (projections[part].out_features // head_dim for part in "qk")
        widths = [projections[part].out_features for part in "qkv"]
    else:
        projections = {"qkv": linear(getattr(module, whole))}
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        if projections["qkv"].out_features != sum(widths):
            raise Unsupported
    if widths != [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim] or out.in_features != widths[0] or heads % kv_heads:
        raise Unsupported
    q_norm = k_norm = None
    per_head = True
    if norms:
        q, k = (_child(module, f"{part}_norm", f"{part}_layernorm") for part in "qk")
        per_head = _width(q) == head_dim
        q_norm, k_norm = (norm_of(each, head_dim if per_head else width) for each, width in zip((q, k), widths))
        if not separate and not per_head:
            raise Unsupported
    scale = getattr(module, "scaling", None)
    # transformers' sdpa does not cap logits. Older versions ran Gemma 2 with it all the same.
    capped = config._attn_implementation == "eager"
    softcap = (capped and getattr(module, "attn_logit_softcapping", None)) or 0.0
    if getattr(module, "sinks", None) is not None:
        raise Unsupported
    return Attention(
        projections,
        out,
        heads,
        kv_heads,
        head_dim,
        float(head_dim**-0.5 if scale is None else scale),
        q_norm,
        k_norm,
        per_head,
        float(softcap),
        ROPES[0],
        by_head=whole == "query_key_value",
    )


def _width(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return None if weight is None else weight.shape[-1]


_PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"))


def _mlp(module: nn.Module, linear: Callable) -> Mlp:
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Dropout)}
    act = next((children.pop(name) for name in ("act_fn", "activation_fn", "act", "activation") if name in children), None)
    if act is None:
        act = next((f for name in ("act_fn", "act") if callable(f := getattr(module, name, None))), None)
    if act is None:
        raise Unsupported
    names = set(children)
    plain = next((pair for pair in _PLAIN if set(pair) == names), None)
    if names == {"gate_proj", "up_proj", "down_proj"}:
        projections = {"gate": linear(children["gate_proj"]), "up": linear(children["up_proj"])}
        down = linear(children["down_proj"])
    elif names == {"gate_up_proj", "down_proj"}:
        projections, down = {"gate_up": linear(children["gate_up_proj"])}, linear(children["down_proj"])
    elif plain:
        projections, down = {"gate": linear(children[plain[0]])}, linear(children[plain[1]])
    else:
        raise Unsupported
    width = down.in_features
    if any(each.out_features != (2 * width if name == "gate_up" else width) for name, each in projections.items()):
        raise Unsupported
    return Mlp(projections, down, _activation(act), width)
