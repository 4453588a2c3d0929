"""The layout of a plain, well-known model from its headers and its config alone: what transformers would say, seconds sooner.

To ask transformers which modules are linear (qcli/checkpoint/modules.py) takes the import of its models, some four seconds, and
of a whole model on the meta device. For a dense decoder that stores exactly the parameters of its family (families/), under their
names and in their shapes, the answer is known. Nothing here decides in doubt: `plain_layout` is None, and transformers is asked,
where the config has a field or a value that is not listed below, where a tensor is missing, too many or of another shape, or
where the installed transformers is of a version that has not been compared. So every fault is found and told by transformers.

tests/memory/test_plain_layout.py compares with transformers' answer.
"""

from collections.abc import Callable
from sys import float_info

from qcli import formats
from qcli.checkpoint.dtypes import MODEL_DTYPES
from qcli.checkpoint.layout import Layout, Linear, OutputHead
from qcli.checkpoint.modules import find_linears
from qcli.checkpoint.source import Source
from qcli.errors import QcliError
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.parameters import parameters

COMPARED = (5, 17), (5, 24)
"""The oldest and the newest transformers whose answers were compared. A newer one is asked, until its number stands here."""

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
}
"""model_type -> the one class that is known. All of their modules with 2-D weights are nn.Linear, but for the embedding, the head
comes last, no module is kept in float32, and names on disk are the model's."""

Check = Callable[[object], bool]


def _whole(value: object) -> bool:
    return type(value) is int and 1 <= value < 1 << 63  # torch has no larger sizes


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= float_info.max


def _fraction(value: object) -> bool:
    return type(value) is float and 0 <= value <= 1


def _flag(value: object) -> bool:
    return type(value) is bool


def _text(value: object) -> bool:
    return type(value) is str


def _token(value: object) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _tokens(value: object) -> bool:
    return _token(value) or (isinstance(value, list) and bool(value) and all(type(i) is int and i >= 0 for i in value))


def _one_of(*values: object) -> Check:
    return lambda value: any(value is each or (type(value) is type(each) and value == each) for each in values)


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


_ROPES = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}


def _rope(value: object) -> bool:
    """Parameters of a rotary embedding, or one set for each kind of layer (Gemma 3)."""
    if not isinstance(value, dict):
        return False
    if value.keys() == {"full_attention", "sliding_attention"}:
        return all(isinstance(part, dict) and "rope_type" in part and _rope(part) for part in value.values())
    kind, numbers = value.get("rope_type"), value.keys() - {"rope_type"}
    expected = _ROPES.get(kind) if isinstance(kind, str) else None
    positive = all(_number(value[name]) and value[name] > 0 for name in numbers)
    return expected is not None and positive and numbers - {"rope_theta", "partial_rotary_factor"} == expected


def _layer_types(value: object) -> bool:
    return isinstance(value, list) and all(kind in ("full_attention", "sliding_attention") for kind in value)


_ACTIVATION = _one_of("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_DTYPE = _one_of(*MODEL_DTYPES)
_FIELDS: dict[str, Check] = {
    # what the layout depends on
    "model_type": _text,
    "architectures": lambda value: isinstance(value, list) and len(value) == 1,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"), _whole),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), _whole),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias", "use_qkv_bias", "qk_layernorm"), _flag),
    "use_parallel_residual": _flag,
    # what the model's code reads as it is built
    "max_position_embeddings": _whole,
    "original_max_position_embeddings": _whole,
    "hidden_act": _ACTIVATION,
    "hidden_activation": _ACTIVATION,
    "rope_parameters": _rope,
    "rope_scaling": _or_null(_rope),
    "rope_theta": lambda value: _number(value) and bool(value),
    "rope_local_base_freq": lambda value: _number(value) and bool(value),
    "partial_rotary_factor": _fraction,
    "layer_types": _layer_types,
    "sliding_window": _or_null(_whole),
    "sliding_window_pattern": _whole,
    "_sliding_window_pattern": _whole,
    "use_sliding_window": _flag,
    "max_window_layers": _whole,
    "use_bidirectional_attention": _one_of(None, False),
    "query_pre_attn_scalar": _whole,
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), _or_null(lambda v: type(v) is float and _number(v))),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "initializer_range"), _fraction),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"), _fraction),
    **dict.fromkeys(("residual_dropout", "embedding_dropout"), _fraction),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "unk_token_id"), _token),
    "eos_token_id": _tokens,
    # what changes nothing
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "use_cache": _flag,
    "pretraining_tp": _whole,
    "cache_implementation": _one_of("hybrid"),
    "is_llama_config": _flag,
    "rope_interleaved": _flag,
    **dict.fromkeys(("transformers_version", "_name_or_path", "_model_name_or_path"), _text),
}


def layout_of(source: Source, *, trust_remote_code: bool = False, rules: bool = False) -> Layout:
    """`find_linears` of an unquantized checkpoint, without transformers where its answer is known. Raises CheckpointError."""
    found = None if rules or source.quantization else plain_layout(source)
    return found or find_linears(source, trust_remote_code=trust_remote_code, rules=rules)


def plain_layout(source: Source) -> Layout | None:
    """The layout of a plain model that is whole by its headers; None where only transformers can tell.

    Of a quantized checkpoint whose codes bear their weights' names too. The shapes of the codes are for its format to check.
    """
    raw = {name: value for name, value in source.config.items() if name != "quantization_config"}
    known = CLASSES.get(raw.get("model_type", ""))
    if known is None or raw.get("architectures") != [known] or not _compared():
        return None
    if not all(name in _FIELDS and _FIELDS[name](value) for name, value in raw.items()):
        return None
    config = ModelConfig(raw, f"{source.label}/config.json")
    try:
        tied = config.tied_embeddings
        if not _fits_together(config, raw):
            return None
        expected = parameters(config)
    except QcliError:  # a field is missing
        return None
    beside, decoded = _companions(source)
    stored = {name: info.shape for name, info in source.tensors.items() if name not in beside}
    shapes = {p.name: p.shape for p in expected}
    of_head = "model.embed_tokens" if tied else "lm_head"
    quantizable = {p.name for p in expected if p.quantizable} | {f"{of_head}.weight"}
    if not decoded <= quantizable or stored | {name: shapes[name] for name in decoded} != shapes:
        return None
    layout = Layout(decided_by=f"transformers' {known}", linear_kinds=["Linear"], unknown=beside)
    layout.modules = {name: name for name in source.tensors}
    weights = [p for p in expected if p.linear or p.name == "lm_head.weight"]
    for each in weights:
        module = each.name.removesuffix(".weight")
        layout.linears[each.name] = Linear(each.name, module, *each.shape)
        layout.candidates.append(module)
    if tied:
        layout.candidates.append("lm_head")
    weight = Linear(f"{of_head}.weight", of_head, config.vocab_size, config.hidden_size)
    layout.head, layout.no_head = OutputHead(weight, "lm_head", "model.embed_tokens", tied), ""
    # The head, what is tied to it, and the last parameter, which belongs to the head or to the norm before it.
    last = expected[-1].name.removesuffix(".weight")
    layout.default_skip = sorted({"lm_head", last} | ({"model.embed_tokens"} if tied else set()))
    return layout


def _companions(source: Source) -> tuple[set[str], set[str]]:
    """The tensors of a quantized checkpoint that stand beside codes, and those of codes."""
    if not source.quantization:
        return set(), set()
    format = formats.of_config(source.quantization)
    return set(format.companions(source.tensors)) if format else set(), set(formats.quantized_weights(source))


def _compared() -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        major, minor = map(int, version("transformers").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return COMPARED[0] <= (major, minor) <= COMPARED[1]


def _fits_together(config: ModelConfig, raw: dict) -> bool:
    """Whether the fields agree with each other, as far as the model's code looks at that."""
    pad, kinds = raw.get("pad_token_id"), raw.get("layer_types")
    rope = raw.get("rope_parameters") or {}
    rotated = config.head_dim * rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    return (
        config.hidden_size % config.heads == 0
        and config.heads % config.kv_heads == 0
        and rotated % 2 == 0
        and 0 < rotated <= config.head_dim
        and (pad is None or pad < config.vocab_size)
        and (kinds is None or len(kinds) == config.layers)
    )
