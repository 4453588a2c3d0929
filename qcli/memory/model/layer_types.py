"""The kind of each layer, in the words of transformers 5, from whichever fields a config has.

A list in the config is taken as it is. Configs that are older than `layer_types` have none; for those the rules here are the ones
of transformers 5's configuration classes.
"""

from qcli.errors import UsageError

_RENAMED = {
    "mamba": "linear_attention",
    "mamba2": "linear_attention",
    "recurrent": "linear_attention",
    "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention",
}
_COMPRESSED = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
# Nemotron-H, RecurrentGemma (whose attention is always local), DeepSeek V4, MiniMax.
_OLDER = {
    "hybrid_override_pattern": {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"},
    "block_types": {"recurrent": "linear_attention", "attention": "sliding_attention"},
    "compress_ratios": _COMPRESSED,
    "attn_type_list": {0: "linear_attention", 1: "full_attention"},
}
_UNIFORM = {
    "mamba": "linear_attention",
    "mamba2": "linear_attention",
    "falcon_mamba": "linear_attention",
    "falcon_h1": "hybrid",
    "granitemoehybrid": "linear_attention",
    "bamba": "linear_attention",
    "deepseek_v32": "indexed_attention",
    "glm_moe_dsa": "indexed_attention",
}
_LISTED = {"zamba": "layers_block_type", "zamba2": "layers_block_type", "recurrent_gemma": "block_types"}
# (kind, p, field): every p-th layer is full attention, the others are of that kind. The field, if there is one, overrules p.
_PERIODIC = {
    "gemma2": ("sliding_attention", 2, None),
    "vaultgemma": ("sliding_attention", 2, None),
    "gpt_oss": ("sliding_attention", 2, None),
    "olmo3": ("sliding_attention", 4, None),
    "gemma3": ("sliding_attention", 6, "sliding_window_pattern"),
    "gemma3_text": ("sliding_attention", 6, "sliding_window_pattern"),
    "gemma3n": ("sliding_attention", 5, None),
    "gemma3n_text": ("sliding_attention", 5, None),
    "gemma4": ("sliding_attention", 6, None),
    "gemma4_text": ("sliding_attention", 6, None),
    "cohere2": ("sliding_attention", 4, "sliding_window_pattern"),
    "exaone4": ("sliding_attention", 4, "sliding_window_pattern"),
    "exaone_moe": ("sliding_attention", 4, "sliding_window_pattern"),
    "afmoe": ("sliding_attention", 4, "global_attn_every_n_layers"),
    "olmo_hybrid": ("linear_attention", 4, None),
    "qwen3_next": ("linear_attention", 4, "full_attention_interval"),
    "qwen3_5": ("linear_attention", 4, "full_attention_interval"),
    "qwen3_5_text": ("linear_attention", 4, "full_attention_interval"),
    "qwen3_5_moe": ("linear_attention", 4, "full_attention_interval"),
    "qwen3_5_moe_text": ("linear_attention", 4, "full_attention_interval"),
}
_LATE_WINDOW = frozenset(
    {"qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3", "qwen3_vl", "qwen3_vl_text", "dots1"}
)

# Fields that state how many experts there are, and how many of them each token uses.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


def of(config) -> list[str]:
    """The kind of every layer of `config`, a ModelConfig. Raises UsageError where a list is not as long as there are layers."""
    count = config.layers
    listed = config.get("layer_types", "layers_block_type", default=None)
    if listed is not None and not isinstance(listed, list):
        raise UsageError(f"layer_types in {config.label} is {listed!r}, expected a list.")
    if listed is None:
        listed = _from_older_lists(config, count)
    if listed is None:
        return _by_rule(config, count)
    if len(listed) < count or (len(listed) > count and config.model_type != "deepseek_v4"):
        raise UsageError(f"{config.label} types {len(listed)} layers, and the model has {count}.")
    return [_RENAMED.get(kind, kind) for kind in listed[:count]]


def window(config) -> int | None:
    """`sliding_window` of `config`, None where it is null, 0 or absent."""
    names = ("sliding_window", "attention_window_size")
    return config.integer(*names, default=None) or None


def _from_older_lists(config, count: int) -> list[str] | None:
    """The kinds from lists under their older names; None where there is no such list."""
    for name, words in _OLDER.items():
        listed = config.get(name, default=None)
        if listed is not None:
            unknown = [item for item in listed if item not in words]
            if unknown:
                raise UsageError(f"{name} in {config.label} has {unknown[0]!r}, expected {', '.join(map(str, words))}.")
            if name == "block_types":  # a pattern that repeats
                listed = [listed[i % len(listed)] for i in range(count)]
            return [words[item] for item in listed]
    first_is_one = config.nested("linear_attn_config", "full_attn_layers")
    if first_is_one is not None:
        return ["full_attention" if i + 1 in first_is_one else "linear_attention" for i in range(count)]
    full, other = config.get("attn_layer_indices", default=None), "linear_attention"
    if full is None:
        full, other = config.get("full_attn_idxs", default=None), "conv"
    if full is None:
        return None
    return ["full_attention" if i in full else other for i in range(count)]


def _by_rule(config, count: int) -> list[str]:
    kind = config.model_type
    if kind in _LISTED:
        raise UsageError(f"{config.label} has no {_LISTED[kind]}, and {kind} has no rule for its layers' kinds.")
    if kind in _UNIFORM:
        return [_UNIFORM[kind]] * count
    if config.get("attn_layer_period", default=None) is not None:
        period, offset = config.positive("attn_layer_period"), config.integer("attn_layer_offset")
        return ["full_attention" if i % period == offset else "linear_attention" for i in range(count)]
    if kind in ("llama4", "llama4_text"):
        interval = config.integer("no_rope_layer_interval", default=4)
        rotary = config.get("no_rope_layers", default=None) or [(i + 1) % interval for i in range(count)]
        return ["chunked_attention" if flag else "full_attention" for flag in rotary]
    if kind == "deepseek_v4":
        later = [_COMPRESSED[4 if i % 2 else 128] for i in range(count - 2)]
        return [_COMPRESSED[128]] * min(count, 2) + later
    if kind == "kimi_linear":
        return ["full_attention" if i and i % 4 == 0 else "linear_attention" for i in range(count)]
    if kind == "mimo_v2_flash":
        return ["sliding_attention" if i and (i + 1) % 6 else "full_attention" for i in range(count)]
    if kind == "cwm":
        return ["sliding_attention" if i % 4 else "full_attention" for i in range(count)]
    if kind == "minimax":
        return ["linear_attention" if i % 2 else "full_attention" for i in range(count)]
    if kind in _PERIODIC:
        return _periodic(config, count, *_PERIODIC[kind])
    windowed = window(config) is not None and config.get("use_sliding_window", default=True)
    if windowed and kind in _LATE_WINDOW:
        first = config.integer("max_window_layers")
        return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    if windowed and kind == "qwen2_moe":
        last = config.integer("max_window_layers")
        return ["sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(count)]
    return ["sliding_attention" if windowed else "full_attention"] * count


def _periodic(config, count: int, other: str, period: int, field: str | None) -> list[str]:
    if other == "sliding_attention" and window(config) is None:
        return ["full_attention"] * count
    if field is not None:
        given = config.get(field, default=period)
        period = given if isinstance(given, str) and set(given) <= {"L", "G"} else config.positive(field, default=period)
    if isinstance(period, str):  # "LLLG": local and global, the last layer always global
        local = [period[i % len(period)] == "L" and i < count - 1 for i in range(count)]
    else:
        local = [(i + 1) % period != 0 for i in range(count)]
    types = [other if flag else "full_attention" for flag in local]
    if config.model_type in ("gemma4", "gemma4_text"):
        types[-1] = "full_attention"
    return types


def holds_experts(config, index: int) -> bool:
    """Whether layer `index` of `config`, a ModelConfig with experts, is a mixture layer (transformers' modeling files)."""
    listed = config.get("mlp_layer_types", default=None)
    if listed is not None:
        return listed[index] != "dense"
    if config.model_type == "nemotron_h":
        return config.layer_types[index] == "moe"
    if config.model_type == "jamba":
        offset = config.integer("expert_layer_offset")
        return config.num_experts > 1 and index % config.positive("expert_layer_period") == offset
    if config.model_type in ("llama4", "llama4_text"):
        step = config.positive("interleave_moe_layer_step")
        return index in config.get("moe_layers", default=range(step - 1, config.layers, step))
    if config.model_type == "ernie4_5_moe":
        first, last = config.integer("moe_layer_start_index"), config.get("moe_layer_end_index", default=-1)
        interval = config.positive("moe_layer_interval")
        return (index + 1) % interval == 0 and first <= index <= (last if last >= 0 else config.layers - 1)
    step = config.integer("decoder_sparse_step", default=1)
    if index in config.listed("mlp_only_layers") or (step and (index + 1) % step):
        return False
    dense = config.integer("first_k_dense_replace", "num_dense_layers", default=0)
    return index >= dense and index % config.positive("moe_layer_freq", default=1) == 0
