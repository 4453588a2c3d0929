"""What training low-rank adapters adds to the weights of a model: LoRA (arXiv:2106.09685) and QLoRA (arXiv:2305.14314).

Adapters are float32, as PEFT makes them, and trained with AdamW: 4 bytes for a weight, 4 for its gradient, 8 for its moments.
QLoRA's base is in 4 bits. PEFT's prepare_model_for_kbit_training casts every other 16-bit parameter to float32; the residual stream
becomes float32 with them. `qcli finetune` casts nothing, computes adapters in 16 bits, and makes a part of the logits at a time.
Activations are counted from what autograd keeps of one Llama layer, in bytes per token. In the formulas
h is hidden_size, f the feed-forward's width, a heads x head_dim, g kv_heads x head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qcli.errors import UsageError
from qcli.memory.costs.layer_moments import attends, has_feed_forward, is_gated

KINDS = ("qlora", "lora", "finetune")
LOGITS_AT_A_TIME = 1 << 24  # of `qcli finetune`, at most, but for 16 tokens
# Bytes per token for each (f, h, a, g): what the backward pass of one layer holds at its peak, and what one layer keeps for
# it. The stream of "qlora" is float32. That of "lora" has 16 bits, and adapters read float32 copies of it. That of "finetune" has
# 16 bits, too, and adapters read it as it is.
_PEAK = {"qlora": (24, 16, 8, 8), "lora": (14, 40, 8, 4), "finetune": (12, 22, 5, 4)}
_KEPT = {"qlora": (16, 16, 8, 8), "lora": (10, 28, 8, 4), "finetune": (8, 12, 4, 4)}
# Without checkpoints: what the last layer holds beyond what it keeps.
_LAST = {"qlora": (8, 2, 0, 0), "lora": (0, 20, 0, 0), "finetune": (0, 28, 0, 0)}
_STREAM = {"qlora": 4, "lora": 2, "finetune": 2}
# Bytes for each logit: itself, a float32 copy, its softmax and their gradients. The training loop holds the logits.
_LOGITS = {"qlora": 16, "lora": 14, "finetune": 12}
_BESIDE_LOGITS = {"qlora": 4, "lora": 2, "finetune": 8}  # bytes for each channel of a token: what enters the head, and gradients
_NARROW = 8  # bytes of a token for each adapter and each of its rank: what "finetune" keeps between A and B
_EXPANDED = 64 << 20  # of a weight's panel in the backward pass of "finetune", at most
_ADAPTER_BYTES = {"adapters": 4, "gradients of adapters": 4, "AdamW's moments": 8}


@dataclass(frozen=True)
class Training:
    """Bytes beyond the model's weights, and how many parameters are trained. `components` sum to `total`."""

    components: dict[str, int]
    total: int
    adapter_parameters: int
    formula: tuple[str, ...]


def training(
    config,
    linears: Sequence[tuple[int, int]],
    others: int,
    tokens: int,
    batch: int = 1,
    rank: int = 16,
    train: str = "qlora",
    checkpointing: bool = True,
    others_itemsize: int = 2,
) -> Training:
    """Adapters of `rank` on `linears`, the [out_features, in_features] of each nn.Linear but the head, over `batch` sequences
    of `tokens`.

    `others` counts the parameters that are not quantized. `others_itemsize` is the bytes of each before training. Without
    `checkpointing` every layer keeps all that its backward pass needs. Raises UsageError for an unknown kind or a bad rank.
    """
    if train not in KINDS:
        raise UsageError(f"train is {train!r}, expected one of {', '.join(KINDS)}.")
    if rank < 1:
        raise UsageError(f"rank is {rank}, expected at least 1.")
    trained = rank * sum(rows + columns for rows, columns in linears)
    components = {name: trained * size for name, size in _ADAPTER_BYTES.items()}
    formula = [f"{rank} x (in + out) over {len(linears)} linear layers = {trained} parameters x (4 + 4 + 8) bytes"]
    if train == "qlora":
        components["float32 casts"] = others * (4 - others_itemsize)
        formula.append(f"{others} parameters that are not quantized, {4 - others_itemsize} bytes more each")
    passed = batch * tokens
    activations, sentence = _activations(config, passed, train, checkpointing)
    components |= activations
    formula.append(sentence)
    if train == "finetune":
        narrow = _NARROW * rank * len(linears) * passed // (config.layers if checkpointing else 1)
        components["between adapters"] = narrow
        formula.append(f"between adapters: {passed} tokens x {rank} x {_NARROW} bytes for each, {narrow} bytes")
    if train != "lora":
        expanded = 2 * max((rows * columns for rows, columns in linears), default=0)
        expanded = min(expanded, _EXPANDED) if train == "finetune" else expanded
        components["one weight expanded"] = expanded
        formula.append(f"one weight expanded: {expanded} bytes, since gradients pass through the dequantized weight")
    return Training(components, sum(components.values()), trained, tuple(formula))


def _activations(config, passed: int, train: str, checkpointing: bool) -> tuple[dict[str, int], str]:
    stream, layers, h = _STREAM[train], config.layers, config.hidden_size
    at_once = min(passed, max(LOGITS_AT_A_TIME // config.vocab_size, 16)) if train == "finetune" else passed
    logits = at_once * _LOGITS[train] * config.vocab_size + passed * _BESIDE_LOGITS[train] * h
    if checkpointing:
        kept, layer = passed * layers * h * stream, passed * _weighted(config, _PEAK[train])
        name, why = "checkpoints of activations", f"{layers} layers x {h} x {stream} bytes"
    else:
        each = _weighted(config, _KEPT[train])
        kept, layer = passed * layers * each, passed * _weighted(config, _LAST[train])
        name, why = "activations of all layers", f"{layers} layers x {each} bytes"
    largest = max(logits, layer)
    words = "the logits, their softmax and gradients" if logits >= layer else "one layer's backward pass"
    sentence = f"{name}: {passed} tokens x {why}; then {words}: {largest} bytes"
    return {name: kept, "logits or one layer": largest}, sentence


def _weighted(config, factors: tuple[int, int, int, int]) -> int:
    """Bytes per token of the layer that takes the most."""
    f = config.intermediate_size if has_feed_forward(config) else 0
    if any(config.is_moe_layer(i) for i in range(config.layers)):
        f = max(f * (not config.is_moe_layer(0)), config.experts_per_token * config.moe_intermediate_size)
    if not is_gated(config):
        f = f * 2 // 3  # two tensors of that width in place of three
    a = g = 0
    if attends(config):
        a, g = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return factors[0] * f + factors[1] * config.hidden_size + factors[2] * a + factors[3] * g
