"""The memory of the tokens read so far: keys and values, latents, and recurrent states, layer by layer.

A layer's bytes for one sequence are `fixed + per_token x tokens`, where a window bounds the tokens; so the whole is
piecewise linear in the context, with the windows as its breakpoints. Two runtimes differ:

- "transformers" (5, DynamicCache): exactly the tokens. A sliding layer keeps its window once decoding goes on; but what it
  keeps of a prompt is a view of the whole prompt's tensor, so all of it stays until the first step after (`prompt_extra`).
  MLA is kept as the latent. "transformers4" is the same with MLA expanded to keys and values of every head.
- "vllm": blocks of 16 tokens; a sliding layer keeps its window, one chunk of prefill and a block; MLA as the latent; a recurrent
  state takes a page of the attention cache, whose block grows until the state fits in.
"""

from dataclasses import dataclass
from fractions import Fraction

from qcli.errors import UsageError
from qcli.memory.states import state

RUNTIMES = ("transformers", "transformers4", "vllm")
# Bytes an element. q8_0 and q4_0: blocks of 32 with a 2-byte scale; nvfp4: blocks of 16 with a 1-byte scale.
KV_BYTES = {
    "float32": Fraction(4), "bfloat16": Fraction(2), "float16": Fraction(2),
    "fp8": Fraction(1), "fp8_e4m3": Fraction(1), "fp8_e5m2": Fraction(1),
    "q8_0": Fraction(34, 32), "q4_0": Fraction(18, 32), "nvfp4": Fraction(9, 16),
}  # fmt: skip
BLOCK_TOKENS = 16
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")
_COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_WITH_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
_NO_ATTENTION = ("linear_attention", "conv", "moe", "mlp")


@dataclass(frozen=True)
class Part:
    """What one layer keeps for one sequence: `fixed` bytes, and `per_token` bytes for each of at most `limit` tokens,
    counted by whole groups of `every`. `label` is the component it belongs to."""

    layer: int
    label: str
    per_token: Fraction
    limit: int | None
    fixed: int
    every: int
    round_up: bool
    formula: str

    def tokens(self, context: int) -> int:
        """Tokens of a `context` for which the part pays."""
        kept = context if self.limit is None else min(context, self.limit)
        return (-(-kept // self.every) if self.round_up else kept // self.every) * self.every

    def bytes(self, context: int) -> int:
        """Bytes for one sequence of `context` tokens."""
        return self.fixed + _ceil(self.per_token * self.tokens(context))


@dataclass(frozen=True)
class Cache:
    """Bytes of the cache of `batch` sequences. `components` sum to `total`, as does `by_layer`.

    `per_token`: bytes that one more token costs, over the batch. `prompt_extra`: bytes beyond `total` that are held from the
    end of the prompt to the next step. `append`: bytes beyond `total` that a decoding step holds while it appends, where
    old and new tensor of a layer stand side by side.
    """

    components: dict[str, int]
    total: int
    by_layer: tuple[int, ...]
    per_token: int
    prompt_extra: int
    append: int
    formula: tuple[str, ...]


def cache(
    config,
    context: int,
    batch: int = 1,
    kv_dtype: str | None = None,
    runtime: str = "transformers",
    encoder_tokens: int | None = None,
    chunk: int = 8192,
    state_dtype: str | None = None,
) -> Cache:
    """The cache of `config`, a ModelConfig, after `context` tokens in each of `batch` sequences.

    `kv_dtype` is a key of KV_BYTES, the model's own by default. `encoder_tokens` (an encoder-decoder's input, `context` by
    default) sets the cross-attention's share. `chunk` is vLLM's max_num_batched_tokens. `state_dtype` overrules the dtype of
    the recurrent states. UsageError for an unknown dtype or runtime.
    """
    made = parts(config, kv_dtype, runtime, chunk, state_dtype)
    components: dict[str, int] = {}
    layers = [0] * config.layers
    for part in made:
        count = batch * part.bytes(context)
        components[part.label] = components.get(part.label, 0) + count
        layers[part.layer] += count
    formula = _sentences(made, context, batch)
    if config.is_encoder_decoder:
        tokens = context if encoder_tokens is None else encoder_tokens
        width = 2 * config.kv_heads * config.head_dim
        each = _ceil(batch * tokens * width * _itemsize(config, kv_dtype))
        components["cross-attention keys and values"] = each * config.layers
        layers = [count + each for count in layers]
        formula.append(
            f"cross-attention: {config.layers} layers x 2 x {config.kv_heads} heads x {config.head_dim} x {tokens} input tokens"
        )
    total = sum(components.values())
    own = runtime != "vllm"
    windowed = [part for part in made if part.limit is not None]
    extra = sum(_ceil(p.per_token * max(0, context - p.limit)) for p in windowed) if own else 0
    append = max((_ceil(p.per_token * p.tokens(context)) for p in made if p.every == 1), default=0) if own else 0
    growing = sum(p.per_token for p in made if p.limit is None or context < p.limit)
    return Cache(
        components, total, tuple(layers), _ceil(batch * growing), batch * extra, batch * append, tuple(formula)
    )


def parts(
    config,
    kv_dtype: str | None = None,
    runtime: str = "transformers",
    chunk: int = 8192,
    state_dtype: str | None = None,
) -> list[Part]:
    """What each layer of `config` keeps for one sequence; arguments as of `cache`."""
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}.")
    itemsize = _itemsize(config, kv_dtype)
    types = config.layer_types
    owners = config.layers - config.integer("num_kv_shared_layers", default=0)
    page = _page(config, itemsize, runtime, state_dtype)
    made = []
    for layer, kind in enumerate(types):
        if kind in _WITH_STATE:
            made.append(_state_part(config, layer, kind, itemsize, runtime, state_dtype, page))
        if kind not in _NO_ATTENTION and layer < owners:
            made += _attention_parts(config, layer, kind, itemsize, runtime, chunk, page)
    return made


def _attention_parts(config, layer: int, kind: str, itemsize: Fraction, runtime: str, chunk: int, page) -> list[Part]:
    block, blocked = (page[0], True) if runtime == "vllm" else (1, False)
    if kind in _COMPRESSED:
        return _compressed_parts(config, layer, kind, itemsize)
    width, why, label = _width(config, kind, runtime)
    limit = None
    if kind in _WINDOWED and config.sliding_window is not None:
        limit, label = config.sliding_window, "keys and values, sliding window"
        if runtime == "vllm":
            limit = limit - 1 + chunk + block
        why += f", at most {limit} tokens"
    made = [Part(layer, label, width * itemsize, limit, 0, block, blocked, why)]
    if kind == "indexed_attention":
        index = config.integer("index_head_dim")
        if runtime == "vllm":  # fp8 with a float32 scale
            made.append(
                Part(layer, "indexer keys", Fraction(index + 4), None, 0, block, True, "index_head_dim + 4 bytes")
            )
        else:
            made.append(Part(layer, "indexer keys", index * itemsize, None, 0, 1, False, "index_head_dim"))
    return made


def _width(config, kind: str, runtime: str) -> tuple[int, str, str]:
    """Elements that one token takes in one layer, why, and the component's name."""
    rank = config.get("kv_lora_rank", default=None)
    if rank is not None:
        rope, heads = config.integer("qk_rope_head_dim"), config.heads
        value = config.integer("v_head_dim")
        if runtime != "transformers4":
            return rank + rope, f"kv_lora_rank {rank} + qk_rope_head_dim {rope}", "latents (MLA)"
        return heads * (config.head_dim + value), f"{heads} heads x ({config.head_dim} + {value})", "keys and values"
    heads, width = attention_shape(config, kind)
    value = config.integer("v_head_dim", default=width) or width
    return heads * (width + value), f"{heads} heads x ({width} + {value})", "keys and values"


def attention_shape(config, kind: str) -> tuple[int, int]:
    """(key and value heads, width of a head) of a layer of `kind`; they differ by kind in Gemma 4 and MiMo."""
    heads, width = config.kv_heads, config.head_dim
    if config.model_type in ("gemma4", "gemma4_text") and kind == "full_attention":
        width = config.integer("global_head_dim", default=512)
        if config.get("attention_k_eq_v", default=False):
            heads = config.integer("num_global_key_value_heads", default=heads)
    if config.model_type == "mimo_v2_flash" and kind == "sliding_attention":
        heads = config.integer("swa_num_key_value_heads", default=2 * heads)
    return heads, width


def _compressed_parts(config, layer: int, kind: str, itemsize: Fraction) -> list[Part]:
    """DeepSeek V4: a window of shared keys and values, and one compressed entry for each `rate` tokens; the sparse kind
    also keeps compressed indexer keys. The few tokens that wait for their group are counted as a full group."""
    rates = config.get("compress_rates", default={})
    rate, width = rates.get(kind, _COMPRESSED[kind]), config.head_dim
    window = config.sliding_window
    sparse = kind == "compressed_sparse_attention"
    index = config.integer("index_head_dim") if sparse else 0
    overlap = 2 if sparse else 1
    waiting = 2 * overlap * (rate - 1) * (width + index) + (2 * (width + index) if sparse else 0)
    entry = Fraction(width + index, rate) * itemsize
    return [
        Part(layer, "keys and values, sliding window", width * itemsize, window, 0, 1, False, f"{width}, at most {window}"),
        Part(
            layer, "compressed keys and values", entry, None, _ceil(waiting * itemsize), rate, False,
            f"({width} + {index}) / {rate}",
        ),
    ]  # fmt: skip


def _state_part(config, layer, kind, itemsize, runtime, state_dtype, page) -> Part:
    shape = state(config, kind)
    if runtime == "vllm":
        fixed = page[1] if page[1] else _state_bytes(config, shape, itemsize, runtime, state_dtype)
    else:
        fixed = _state_bytes(config, shape, itemsize, runtime, state_dtype)
    return Part(layer, "recurrent state", Fraction(0), None, fixed, 1, False, shape.formula)


def _state_bytes(config, shape, itemsize: Fraction, runtime: str, state_dtype: str | None) -> int:
    kernel, model = shape.kernel, KV_BYTES.get(config.dtype, Fraction(2))
    dtype = state_dtype
    if runtime == "vllm":
        kernel = max(0, kernel - 1)
        dtype = dtype or config.get("mamba_ssm_cache_dtype", "mamba_ssm_dtype", default=None)
        recurrent = KV_BYTES.get(dtype, model)
    else:
        recurrent = KV_BYTES.get(dtype, model if config.model_type == "minimax" else Fraction(4))
    return _ceil(shape.channels * kernel * model + shape.recurrent * recurrent)


def _page(config, itemsize: Fraction, runtime: str, state_dtype: str | None) -> tuple[int, int]:
    """(tokens in a block, bytes of a padded state) under vLLM: beside attention layers, the block grows by 16 tokens until
    a layer's block is no smaller than a state, and the state is padded to it."""
    types = config.layer_types
    stateful = [kind for kind in types if kind in _WITH_STATE]
    attending = [kind for kind in types if kind not in _NO_ATTENTION]
    if runtime != "vllm" or not stateful or not attending:
        return BLOCK_TOKENS, 0
    need = _state_bytes(config, state(config, stateful[0]), itemsize, runtime, state_dtype)
    token = _width(config, attending[0], runtime)[0] * itemsize
    block = -(-need // _ceil(token * BLOCK_TOKENS)) * BLOCK_TOKENS
    return block, _ceil(block * token)


def _itemsize(config, kv_dtype: str | None) -> Fraction:
    name = kv_dtype or (config.dtype if config.dtype in KV_BYTES else "bfloat16")
    if name not in KV_BYTES:
        raise UsageError(f"the cache's dtype is {name!r}, expected one of {', '.join(KV_BYTES)}.")
    return KV_BYTES[name]


def _sentences(made: list[Part], context: int, batch: int) -> list[str]:
    """One sentence for each kind of part: how many layers, the formula, the bytes."""
    groups: dict[tuple, list[Part]] = {}
    for part in made:
        groups.setdefault((part.label, part.formula, part.per_token, part.fixed), []).append(part)
    sentences = []
    for (label, formula, per_token, fixed), alike in groups.items():
        total = batch * sum(part.bytes(context) for part in alike)
        cost = f"{float(per_token):g} bytes a token x {alike[0].tokens(context)} tokens" if per_token else ""
        if fixed:
            cost += f"{' + ' if cost else ''}{fixed} bytes"
        sentences.append(f"{label}: {len(alike)} layers x ({formula}: {cost}) x {batch} sequences = {total} bytes")
    return sentences


def _ceil(value: Fraction | int) -> int:
    return -(-Fraction(value).numerator // Fraction(value).denominator)
