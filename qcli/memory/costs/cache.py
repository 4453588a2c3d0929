"""The memory of the tokens read so far: keys and values, latents, and recurrent states, layer by layer.

The bytes of a layer for one sequence are `fixed + per_token x tokens`, and a window may limit the tokens. The whole is piecewise
linear in the context, and its breakpoints are the windows. `parts` gives them. Runtimes differ:

- "transformers" (5, DynamicCache) keeps exactly the tokens. A sliding layer keeps its window while decoding. After a prompt it
  keeps a view of the whole prompt's tensor, and all of that stays until the first step (`prompt_extra`). MLA is kept as the latent.
  "transformers4" is the same, with MLA expanded to the keys and values of every head.
- "vllm" keeps blocks of 16 tokens. A sliding layer keeps its window, one chunk of prefill and a block. MLA is kept as the latent. A
  recurrent state takes a page of the attention cache, whose block grows until the state fits.
"""

from dataclasses import dataclass
from fractions import Fraction

from qcli.memory.costs.cache_parts import CachePart, ceil, itemsize_of, parts


@dataclass(frozen=True)
class Cache:
    """Bytes of the cache of `batch` sequences. `components` sum to `total`, and so does `by_layer`.

    per_token: bytes that one more token costs, over the batch. prompt_extra: bytes beyond `total` that are held from the end of the
    prompt to the next step. append: bytes beyond `total` that a decoding step holds while it appends, when the old and the new
    tensor of a layer are both alive.
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

    `kv_dtype` is a key of KV_BYTES, by default the model's own dtype. `encoder_tokens` is the length of an encoder-decoder's input,
    `context` by default; it sets the size of the cross-attention. `chunk` is vLLM's max_num_batched_tokens. `state_dtype` overrules
    the dtype of the recurrent states. Raises UsageError for an unknown dtype or runtime.
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
        each = ceil(batch * tokens * width * itemsize_of(config, kv_dtype))
        components["cross-attention keys and values"] = each * config.layers
        layers = [count + each for count in layers]
        formula.append(
            f"cross-attention: {config.layers} layers x 2 x {config.kv_heads} heads x {config.head_dim} x {tokens} input tokens"
        )
    total = sum(components.values())
    growing = sum(part.per_token for part in made if part.limit is None or context < part.limit)
    extra = append = 0
    if runtime != "vllm":
        windowed = [part for part in made if part.limit is not None]
        extra = sum(ceil(part.per_token * max(0, context - part.limit)) for part in windowed)
        append = max((ceil(part.twice * part.per_token * part.tokens(context)) for part in made), default=0)
    return Cache(components, total, tuple(layers), ceil(Fraction(batch * growing)), batch * extra, batch * append, tuple(formula))


def _sentences(made: list[CachePart], context: int, batch: int) -> list[str]:
    """A sentence for each kind of part: how many layers, the formula, the bytes."""
    groups: dict[tuple, list[CachePart]] = {}
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
