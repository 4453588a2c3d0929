"""Which layers of a mixture-of-experts model hold routed experts: six ways in which configs say so."""

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


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
