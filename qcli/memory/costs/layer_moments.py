"""The moments at which a layer holds most: in its feed-forward, its attention, its recurrence.

A moment is a count of elements per token. The counts were read off transformers 5's modeling files, and tests compare them with
the tensors that are alive there. In the formulas h is hidden_size, f the feed-forward's width, a heads x head_dim, g kv_heads x
head_dim, k experts per token.

An example: Llama's feed-forward takes 3 x f + 4 x h. At its product, the activated gate, the up projection's output and the product
are alive, f elements each. The embeddings, the layer's input, the residual sum and the module's input are alive too, h elements
each. Attention has three such h. Rotary tables and masks are alive through all layers.
"""

from dataclasses import dataclass

from qcli.memory.costs.cache_parts import attention_shape
from qcli.memory.costs.states import state
from qcli.memory.installed import transformers_version

# Feed-forward without a gate: how many f and how many h are alive at its activation. Where the activation is made of several
# operations, the results of each count.
UNGATED = {
    "gpt2": (4, 6),
    "gptj": (4, 6),
    "codegen": (4, 6),
    "gpt_neo": (4, 8),
    "bloom": (5, 6),
    "phi": (4, 4),
    "mpt": (2, 8),
    "opt": (2, 4),
    "gpt_neox": (2, 4),
    "falcon": (2, 4),
    "starcoder2": (2, 4),
    "gpt_bigcode": (2, 6),
    "apertus": (6, 4),
    "persimmon": (3, 4),
    "nemotron": (3, 4),
    "t5": (2, 4),
    "mt5": (2, 4),
    "umt5": (2, 4),
}
_GATED = {
    "phi3": (4, 4),
    "glm": (4, 4),
    "glm4": (4, 4),
    "stablelm": (3, 6),
    "olmo2": (3, 3),
    "olmo3": (3, 3),
    "exaone4": (3, 3),
    "t5": (4, 4),
    "mt5": (4, 4),
    "umt5": (4, 4),
}
# Attention that transformers does not fuse, or whose bias is as large as the scores. Three numbers: bytes alive per head and pair
# of tokens; how many a are alive with them; how many of those bytes stay alive through the feed-forward.
_EAGER = {
    "gemma2": (10, 3, 2),
    "gpt_oss": (6, 3, 2),
    "bloom": (14, 3, 0),
    "mpt": (12, 3, 2),
    "gptj": (10, 8, 2),
    "codegen": (10, 10, 2),
    "gpt_neo": (10, 6, 2),
    "mimo_v2_flash": (6, 3, 2),
    "t5": (6, 2, 2),
    "mt5": (6, 2, 2),
    "umt5": (6, 2, 2),
}
_FUSED_SINCE_5_24 = ("gptj", "codegen")  # since then the feed-forward also has two h less
# Queries and keys rotated or normalized in float32: how many a and g are alive.
_IN_FLOAT32 = {"cohere": (7, 6), "ernie4_5": (6, 4), "olmo2": (9, 0), "olmo3": (9, 0)}
_ROTARY_BY_KIND = ("gemma3", "gemma3_text", "gemma3n_text", "gemma4_text", "olmo3")
_NO_ROTARY = ("gpt2", "opt", "bloom", "mpt", "gpt_neo", "gpt_bigcode", "t5", "mt5", "umt5")
_MASKED = ("falcon", "qwen2_moe")  # they make a mask even where it would only be causal
_ROUTED_IN_16_BIT = ("qwen2_moe", "qwen3_moe", "qwen3_next", "olmoe", "qwen3_5_moe", "qwen3_5_moe_text")
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding")
_NO_ATTENTION = ("linear_attention", "conv", "moe", "mlp")


@dataclass(frozen=True)
class Pass:
    """What passes through a layer at once: `total` tokens, in sequences of `span` positions, with elements of `itemsize` bytes.

    `pairs` is how many pairs of tokens meet in attention; 0 under a runtime that never holds anything for each pair.
    """

    total: int
    span: int
    pairs: int
    itemsize: int


def moments(config, through: Pass) -> tuple[dict[str, int], list[str]]:
    """Bytes of each moment, in the layer of `config` (a ModelConfig) that holds most then, and a sentence for each."""
    found: dict[str, int] = {}
    sentences: list[str] = []
    masks, mask_bytes = _masks(config, through)
    always = masks * mask_bytes * through.pairs + _rotary(config) * through.span * through.itemsize
    if always:
        sentences.append(f"rotary tables and {masks} masks: {always} bytes, alive through all layers")
    eager = _eager(config)
    kept_scores = eager[2] * config.heads * through.pairs if eager else 0
    for name, count, why in (*_feed_forward(config), *_mixers(config)):
        extra = kept_scores if name == "feed-forward" else 0
        found[name] = max(found.get(name, 0), through.total * count * through.itemsize + always + extra)
        sentences.append(f"{name}: {through.total} tokens x {count} elements ({why}) x {through.itemsize} bytes")
    scores, why = _scores(config, through, masks)
    if scores:
        found["attention"] = max(found.get("attention", 0), scores + always)
        sentences.append(why)
    return found, sentences


def _feed_forward(config) -> list[tuple[str, int, str]]:
    h, f, kind = config.hidden_size, config.intermediate_size, config.model_type
    if not has_feed_forward(config):
        return []
    if any(config.is_moe_layer(i) for i in range(config.layers)):
        f, k = config.moe_intermediate_size, config.experts_per_token
        if kind in ("llama4", "llama4_text"):  # every expert sees every token
            k = config.num_experts
        wide, deep = 9 if kind == "gpt_oss" else 4, 4 if kind in _ROUTED_IN_16_BIT else 6
        inside, after = k * (wide * f + h), deep * k * h
        if inside >= after:
            return [("feed-forward", inside + 4 * h, f"k x ({wide} x f + h) + 4 x h, f={f}, h={h}, k={k}")]
        return [("feed-forward", after + 4 * h, f"{deep} x k x h where experts' outputs are summed + 4 x h, h={h}, k={k}")]
    if kind in UNGATED and not is_gated(config):
        wide, deep = UNGATED[kind]
        deep -= 2 if kind in _FUSED_SINCE_5_24 and _eager(config) is None else 0
    else:
        wide, deep = _GATED.get(kind, (3, 4))
    if kind == "gemma3n_text":
        deep = 12 + 3 * config.integer("altup_num_inputs", default=4)
    return [("feed-forward", wide * f + deep * h, f"{wide} x f + {deep} x h, f={f}, h={h}")]


def attends(config) -> bool:
    """Whether any layer has attention."""
    return bool(set(config.layer_types) - set(_NO_ATTENTION))


def has_feed_forward(config) -> bool:
    """Whether layers have a feed-forward. A layer of a pure Mamba is its scan alone."""
    return config.model_type not in ("mamba", "mamba2", "falcon_mamba")


def is_gated(config) -> bool:
    """Whether the feed-forward has a gate. T5 has a field for it."""
    return config.model_type not in UNGATED or str(config.get("feed_forward_proj", default="")).startswith("gated")


def _mixers(config) -> list[tuple[str, int, str]]:
    """The moments of attention and of recurrence, without the cache that they fill."""
    types, h, made = set(config.layer_types), config.hidden_size, []
    if types & {"linear_attention", "hybrid", "hybrid_sliding"} and config.model_type not in ("minimax", "recurrent_gemma"):
        made.append(("recurrence", *_recurrence(config)))
    attending = types - set(_NO_ATTENTION)
    if not attending:
        return made
    a = config.heads * config.head_dim
    if config.get("kv_lora_rank", default=None) is not None:
        rope, value = config.integer("qk_rope_head_dim"), config.value_head_dim
        count = 4 * h + 2 * a + config.heads * (rope + value) + expanded(config)
        made.append(("attention", count, "4 x h, queries in three forms, keys and values expanded, output"))
        return made
    heads, width = max((attention_shape(config, kind) for kind in attending), key=lambda shape: shape[0] * shape[1])
    g, kind = heads * width, config.model_type
    if kind in _IN_FLOAT32:
        queries, keys = _IN_FLOAT32[kind]
        count, why = 3 * h + queries * a + keys * g, f"{queries} x a + {keys} x g"
    elif kind in _NO_ROTARY:
        count, why = 3 * h + 4 * a, "4 x a"
    else:
        count, why = 3 * h + max(4 * a, 2 * a + 3 * g), "the larger of 4 x a and 2 x a + 3 x g"
    made.append(("attention", count, f"3 x h + {why}, h={h}, a={a}, g={g}"))
    return made


def _recurrence(config) -> tuple[int, str]:
    """Elements of 16 bits per token that the scan of a recurrent layer takes, and their formula.

    transformers scans in torch, in float32, by chunks. The kernels of mamba-ssm and flash-linear-attention, separate packages, need
    a small share of this.
    """
    h, kind = config.hidden_size, config.model_type
    shape = state(config, "linear_attention")
    if kind == "kimi_linear":
        width = shape.channels // 3
        return 400 * width + 4 * h, f"400 x heads x head_dim {width} + 4 x h"
    if shape.heads and shape.chunk:
        chunks = shape.heads * (11 * shape.chunk + 15 * shape.size + 400) // 2
        scan = f"{shape.heads} heads x (5.5 x chunk {shape.chunk} + 7.5 x state {shape.size} + 200)"
        if transformers_version() < (5, 18):  # it multiplies all pairs of a chunk before it sums them
            wide = max(shape.size, shape.inner // shape.heads)
            chunks += 2 * shape.heads * shape.chunk * wide
            scan += f" + {shape.heads} heads x 2 x chunk {shape.chunk} x {wide}"
        return chunks + 31 * shape.inner // 2 + 4 * h, f"{scan} + 15.5 x inner {shape.inner} + 4 x h"
    if shape.heads:
        keys, values = shape.heads * shape.size, shape.inner
        count = (27 * keys + 29 * values + 342 * shape.heads) // 2 + 5 * h
        return count, f"13.5 x {keys} keys + 14.5 x {values} values + 171 x {shape.heads} heads + 5 x h"
    return (6 * shape.size + 11) * shape.inner + 3 * h, f"(6 x state {shape.size} + 11) x inner {shape.inner} + 3 x h"


def _rotary(config) -> int:
    """Elements per position of the tables of cosines and sines: two tables for each kind of position."""
    types = set(config.layer_types) - set(_NO_ATTENTION)
    if not types or config.model_type in _NO_ROTARY:
        return 0
    mla = config.get("kv_lora_rank", default=None) is not None
    width = config.integer("qk_rope_head_dim") if mla else config.head_dim
    return 2 * width * (len(types) if config.model_type in _ROTARY_BY_KIND else 1)


def _masks(config, through: Pass) -> tuple[int, int]:
    """(masks, bytes of one for each pair). Where attention is not fused, each kind of it has a mask. Where it is fused, there is
    one mask if a window is shorter than the sequence, or if the model always makes one."""
    kinds = set(config.layer_types) - set(_NO_ATTENTION)
    windowed = [kind for kind in kinds if kind in _WINDOWED and (config.sliding_window or through.span) < through.span]
    if _eager(config):
        return len(kinds), through.itemsize
    return (1, 1) if windowed or config.model_type in _MASKED else (0, 0)


def _eager(config) -> tuple[int, int, int] | None:
    """The model's entry in _EAGER, if the installed transformers does not fuse its attention."""
    kind = config.model_type
    if kind in _FUSED_SINCE_5_24 and transformers_version() >= (5, 24):
        return None
    return _EAGER.get(kind)


def _scores(config, through: Pass, masks: int) -> tuple[int, str]:
    """Bytes of the attention of every token to every other, where it is not fused or takes a mask."""
    if not masks or not through.pairs:
        return 0, ""
    h, a = config.hidden_size, config.heads * config.head_dim
    if eager := _eager(config):
        wide, beside, _ = eager
        wide = wide if through.itemsize == 2 else wide * 8 // 5
        count = through.pairs * config.heads * wide + through.total * (3 * h + beside * a) * through.itemsize
        return (count, f"attention: {through.pairs} pairs x {config.heads} heads x {wide} bytes, not fused in transformers")
    # The mask of bools is copied in the model's dtype. Keys and values are repeated for every head.
    count = through.pairs * through.itemsize + through.total * (3 * h + 4 * a) * through.itemsize
    return count, f"attention: a mask's copy, {through.pairs} pairs x {through.itemsize} bytes, and 3 x h + 4 x a"


def expanded(config) -> int:
    """Elements per token of one layer's latents, expanded to the keys and values of every head. Keys are copied once more, when
    their two parts are joined."""
    nope, value = config.integer("qk_nope_head_dim"), config.value_head_dim
    return config.heads * (nope + value + config.head_dim)
