"""What each layer keeps of the tokens read so far, as a function of their number.

Shapes and lifetimes are those of transformers 5's cache classes and modeling files, and of vLLM's kv_cache_interface.
"""

from dataclasses import dataclass
from fractions import Fraction

from qcli.checkpoint.dtypes import CODES, ITEMSIZE, MODEL_DTYPES
from qcli.errors import UsageError
from qcli.memory.costs.states import state
from qcli.memory.installed import transformers_version

RUNTIMES = ("transformers", "transformers4", "vllm")
# Bytes of an element. q8_0 and q4_0: blocks of 32 with a 2-byte scale; nvfp4: blocks of 16 with a 1-byte scale.
KV_BYTES = {
    **{name: Fraction(ITEMSIZE[CODES[name]]) for name in MODEL_DTYPES},
    "fp8": Fraction(1),
    "fp8_e4m3": Fraction(1),
    "fp8_e5m2": Fraction(1),
    "q8_0": Fraction(34, 32),
    "q4_0": Fraction(18, 32),
    "nvfp4": Fraction(9, 16),
}
BLOCK_TOKENS = 16
_WINDOWED = ("sliding_attention", "chunked_attention", "hybrid_sliding", "reference_sliding_attention")
_COMPRESSED = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_WITH_STATE = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
_NO_ATTENTION = ("linear_attention", "conv", "moe", "mlp")


@dataclass(frozen=True)
class CachePart:
    """What one layer keeps for one sequence: `fixed` bytes, and `per_token` bytes for each of at most `limit` tokens.

    Tokens are counted in whole groups of `every`. `label` is the component that the part belongs to. `twice` is the share that a
    step holds twice while it appends: transformers makes a longer tensor while the old one is alive, first for keys, then for
    values.
    """

    layer: int
    label: str
    formula: str
    per_token: Fraction = Fraction(0)
    limit: int | None = None
    fixed: int = 0
    every: int = 1
    round_up: bool = False
    twice: Fraction = Fraction(0)

    def tokens(self, context: int) -> int:
        """How many tokens of a `context` take memory here."""
        kept = context if self.limit is None else min(context, self.limit)
        return (-(-kept // self.every) if self.round_up else kept // self.every) * self.every

    def bytes(self, context: int) -> int:
        """Bytes for one sequence of `context` tokens."""
        return self.fixed + ceil(self.per_token * self.tokens(context))


def parts(
    config, kv_dtype: str | None = None, runtime: str = "transformers", chunk: int = 8192, state_dtype: str | None = None
) -> list[CachePart]:
    """What each layer of `config` keeps for one sequence. The arguments are those of `cache`."""
    if runtime not in RUNTIMES:
        raise UsageError(f"runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}.")
    itemsize = itemsize_of(config, kv_dtype)
    types = config.layer_types
    owners = config.layers - config.integer("num_kv_shared_layers", default=0)
    page = _page(config, itemsize, runtime, state_dtype)
    made = []
    for layer, kind in enumerate(types):
        if kind in _WITH_STATE:
            made.append(_state_part(config, layer, kind, runtime, state_dtype, page))
        if kind not in _NO_ATTENTION and layer < owners:
            made += _attention_parts(config, layer, kind, itemsize, runtime, chunk, page)
    return made


def _attention_parts(config, layer: int, kind: str, itemsize: Fraction, runtime: str, chunk: int, page) -> list[CachePart]:
    if kind in _COMPRESSED:
        return _compressed_parts(config, layer, kind, itemsize)
    blocks = {"every": page[0], "round_up": True} if runtime == "vllm" else {}
    keys, values, why, label = _widths(config, kind, runtime)
    limit, twice = None, Fraction(keys, keys + values)
    if kind in _WINDOWED and config.sliding_window is not None:
        limit, twice, label = config.sliding_window, Fraction(1), "keys and values, sliding window"
        if runtime == "vllm":
            limit += chunk - 1 + page[0]
        why += f", at most {limit} tokens"
    twice = Fraction(0) if runtime == "vllm" else twice
    made = [CachePart(layer, label, why, (keys + values) * itemsize, limit, twice=twice, **blocks)]
    if kind == "indexed_attention":
        index = config.integer("index_head_dim")
        # vLLM keeps indexer keys in fp8, with a float32 scale.
        each, why = (Fraction(index + 4), "index_head_dim + 4") if blocks else (index * itemsize, "index_head_dim")
        made.append(CachePart(layer, "indexer keys", why, each, **blocks))
    return made


def _widths(config, kind: str, runtime: str) -> tuple[int, int, str, str]:
    """Elements of keys and of values that one token takes in one layer, the formula, and the component's name."""
    rank = config.get("kv_lora_rank", default=None)
    heads, width = (config.heads, config.head_dim) if rank is not None else attention_shape(config, kind)
    if kind == "indexed_attention" and runtime == "transformers" and transformers_version() < (5, 18):
        runtime = "transformers4"  # before 5.18 a layer with an indexer kept its latents expanded
    if rank is not None and runtime != "transformers4":
        rope = config.integer("qk_rope_head_dim")
        return rank, rope, f"kv_lora_rank {rank} + qk_rope_head_dim {rope}", "latents (MLA)"
    value = config.value_head_dim if width == config.head_dim else width
    return heads * width, heads * value, f"{heads} heads x ({width} + {value})", "keys and values"


def attention_shape(config, kind: str) -> tuple[int, int]:
    """(key and value heads, width of a head) of a layer of `kind`. In Gemma 4 and MiMo they differ by kind."""
    heads, width = config.kv_heads, config.head_dim
    if config.model_type in ("gemma4", "gemma4_text") and kind == "full_attention":
        width = config.integer("global_head_dim", default=512)
        if config.get("attention_k_eq_v", default=False):
            heads = config.integer("num_global_key_value_heads", default=heads)
    if config.model_type == "mimo_v2_flash" and kind == "sliding_attention":
        heads = config.integer("swa_num_key_value_heads", default=2 * heads)
    return heads, width


def _compressed_parts(config, layer: int, kind: str, itemsize: Fraction) -> list[CachePart]:
    """DeepSeek V4: a window of shared keys and values, and one compressed entry for each `rate` tokens. The sparse kind also keeps
    compressed indexer keys. The tokens that wait until their group is full are counted as a full group."""
    rate, width = config.nested("compress_rates", kind) or _COMPRESSED[kind], config.head_dim
    window = config.sliding_window
    sparse = kind == "compressed_sparse_attention"
    index = config.integer("index_head_dim") if sparse else 0
    overlap = 2 if sparse else 1
    waiting = 2 * overlap * (rate - 1) * (width + index) + (2 * (width + index) if sparse else 0)
    entry = Fraction(width + index, rate) * itemsize
    why = f"({width} + {index}) / {rate}, and less than {rate} tokens that wait"
    fixed = ceil(waiting * itemsize)
    return [
        CachePart(layer, "keys and values, sliding window", f"{width}, at most {window} tokens", width * itemsize, window),
        CachePart(layer, "compressed keys and values", why, entry, fixed=fixed, every=rate),
    ]


def _state_part(config, layer: int, kind: str, runtime: str, state_dtype: str | None, page) -> CachePart:
    shape = state(config, kind)
    fixed = page[1] or _state_bytes(config, shape, runtime, state_dtype)
    return CachePart(layer, "recurrent state", shape.formula, fixed=fixed)


def _state_bytes(config, shape, runtime: str, state_dtype: str | None) -> int:
    kernel, model = shape.kernel, KV_BYTES.get(config.dtype, Fraction(2))
    dtype = state_dtype
    if runtime == "vllm":
        kernel = max(0, kernel - 1)
        dtype = dtype or config.get("mamba_ssm_cache_dtype", "mamba_ssm_dtype", default=None)
        recurrent = KV_BYTES.get(dtype, model)
    else:
        recurrent = KV_BYTES.get(dtype, model if config.model_type == "minimax" else Fraction(4))
    return ceil(shape.channels * kernel * model + shape.recurrent * recurrent)


def _page(config, itemsize: Fraction, runtime: str, state_dtype: str | None) -> tuple[int, int]:
    """(tokens in a block, bytes of a padded state) under vLLM.

    In a model with attention too, the block grows by 16 tokens until a layer's block is no smaller than a state. The state is then
    padded to the block.
    """
    types = config.layer_types
    stateful = [kind for kind in types if kind in _WITH_STATE]
    attending = [kind for kind in types if kind not in _NO_ATTENTION]
    if runtime != "vllm" or not stateful or not attending:
        return BLOCK_TOKENS, 0
    need = _state_bytes(config, state(config, stateful[0]), runtime, state_dtype)
    token = sum(_widths(config, attending[0], runtime)[:2]) * itemsize
    block = -(-need // ceil(token * BLOCK_TOKENS)) * BLOCK_TOKENS
    return block, ceil(block * token)


def itemsize_of(config, kv_dtype: str | None) -> Fraction:
    """Bytes of one cached element, by default of the model's own dtype. Raises UsageError for an unknown dtype."""
    name = kv_dtype or (config.dtype if config.dtype in KV_BYTES else "bfloat16")
    if name == "int8":  # qcli generate's: with a float32 scale for each key and value of a head
        return 1 + Fraction(4, config.head_dim)
    if name not in KV_BYTES:
        raise UsageError(f"the cache's dtype is {name!r}, expected one of int8, {', '.join(KV_BYTES)}.")
    return KV_BYTES[name]


def ceil(value: Fraction) -> int:
    """`value` bytes, rounded up to whole ones."""
    return -(-value.numerator // value.denominator)
