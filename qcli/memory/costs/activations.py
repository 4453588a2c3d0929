"""What a forward pass holds beyond weights and cache, at its peak.

Layers reuse each other's memory. The peak is therefore the largest of a few moments: those of a layer (layer_moments.py), of a
quantized product within it, and of the logits. What the allocator adds is overhead, and so are the workspaces of kernels.
"""

from dataclasses import dataclass

from qcli.checkpoint.dtypes import MODEL_DTYPES
from qcli.errors import UsageError
from qcli.memory.costs.cache_parts import KV_BYTES, RUNTIMES
from qcli.memory.costs.layer_moments import Pass, attends, expanded, has_feed_forward, is_gated, moments
from qcli.schemes import NAMED, QUANTIZED, Scheme

METHODS = (*MODEL_DTYPES, *QUANTIZED)
LOGITS = ("last", "all")
_FEW_TOKENS = 8  # for up to this many, a weight of 4-bit floats is multiplied without being expanded


@dataclass(frozen=True)
class Activations:
    """Bytes beyond weights and cache.

    `prefill` is the peak while a prompt is read: the largest of `moments`, which `binding` names. `decode` is the peak while one
    token is made: the largest of `decode_moments`.
    """

    prefill: int
    decode: int
    moments: dict[str, int]
    decode_moments: dict[str, int]
    binding: str
    formula: tuple[str, ...]


@dataclass(frozen=True)
class _Linear:
    """A quantized product: its sizes, and the elements alive per token besides its output."""

    name: str
    alive: int
    columns: int
    rows: int


def activations(
    config,
    tokens: int,
    batch: int = 1,
    context: int | None = None,
    method: str = "bfloat16",
    dtype: str | None = None,
    runtime: str = "transformers",
    logits: str = "last",
    chunk: int = 8192,
) -> Activations:
    """The peak of `config`, a ModelConfig, over prompts of `tokens` in each of `batch` sequences, and of a step at `context`
    (`tokens` by default).

    `method` is one of METHODS. `dtype` is that of the activations: by default the method's, or else the model's. `logits` "all"
    is a forward pass without generation, as for perplexity: the logits of every token are kept and copied to float32. Under vLLM
    a pass takes at most `chunk` tokens over all sequences. Prompts have one length; padding would cost a mask. Raises UsageError
    for an unknown name.
    """
    for name, value, known in (("method", method, METHODS), ("runtime", runtime, RUNTIMES), ("logits", logits, LOGITS)):
        if value not in known:
            raise UsageError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    itemsize = int(KV_BYTES.get(dtype or (method if method in KV_BYTES and method not in QUANTIZED else config.dtype), 2))
    context = tokens if context is None else context
    if runtime == "vllm":
        prompt = Pass(min(batch * tokens, chunk), min(tokens, chunk), 0, itemsize)
        step = Pass(batch, 1, 0, itemsize)
    else:
        prompt = Pass(batch * tokens, tokens, batch * tokens**2, itemsize)
        step = Pass(batch, 1, batch * context, itemsize)
    found, formula = _of_pass(config, prompt, method)
    found["logits"], sentence = _logits(config, prompt.total if logits == "all" else batch, itemsize, logits)
    formula.append(sentence)
    stepping, _ = _of_pass(config, step, method)
    stepping["logits"], _ = _logits(config, batch, itemsize, "last")
    if config.get("kv_lora_rank", default=None) is not None and runtime == "transformers":
        elements = expanded(config)
        stepping["attention"] += batch * context * elements * itemsize
        formula.append(f"a step expands a layer's latents: {batch} x {context} tokens x {elements} elements x {itemsize} bytes")
    binding = max(found, key=found.get)
    return Activations(found[binding], max(stepping.values()), found, stepping, binding, tuple(formula))


def _of_pass(config, through: Pass, method: str) -> tuple[dict[str, int], list[str]]:
    found, formula = moments(config, through)
    if method in QUANTIZED:
        for product in _linears(config):
            found[product.name], why = _quantized(product, through, NAMED[method])
            formula.append(why)
    return found, formula


def _linears(config) -> list[_Linear]:
    """The quantized products that can be the peak. Experts are fused parameters, which stay in 16 bits."""
    h, f, made = config.hidden_size, config.intermediate_size, []
    if attends(config):
        a = config.heads * config.head_dim
        made = [_Linear("query projection", 3 * h, h, a), _Linear("output projection", 3 * h + a, a, h)]
    if not has_feed_forward(config) or all(config.is_moe_layer(i) for i in range(config.layers)):
        return made
    made.append(_Linear("up projection", 4 * h + (f if is_gated(config) else 0), h, f))
    made.append(_Linear("down projection", 4 * h + f, f, h))
    return made


def _quantized(product: _Linear, through: Pass, scheme: Scheme) -> tuple[int, str]:
    rows, columns, total = product.rows, product.columns, through.total
    shape = f"{product.name} [{rows}, {columns}]"
    alive = total * (product.alive + rows) * through.itemsize
    if scheme.activations and not scheme.codebook:
        # The input in int8, the absmax of its rows, and the product in int32 before it is scaled.
        each = columns + 4 + 4 * rows
        return (alive + total * each, f"{shape} in int8: {total} tokens x ({columns} + 4 + 4 x {rows} = {each}) bytes more")
    if scheme.activations:  # in float32, as quotients and as what they were rounded to
        alive += total * columns * 12
    if total <= _FEW_TOKENS:
        return alive, f"{shape}: its {scheme.bits}-bit weight is multiplied as it is stored"
    extra = rows * columns * through.itemsize + (4 * scheme.scales(rows, columns) if scheme.double_quant else 0)
    return alive + extra, f"{shape}: its weight expanded, {extra} bytes"


def _logits(config, kept: int, itemsize: int, logits: str) -> tuple[int, str]:
    """The logits of a forward pass and their copy in float32. In generation the softmax makes another copy."""
    v, copies = config.vocab_size, 4 if logits == "all" else 8
    count = kept * (v * (itemsize + copies) + config.hidden_size * itemsize)
    return count, f"logits: {kept} tokens x {v} x ({itemsize} + {copies} bytes in float32)"
