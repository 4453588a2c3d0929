"""Small configs of many families, in which no two sizes that matter are the same where the family allows it."""

_SIZES = dict(vocab_size=64, num_hidden_layers=4, hidden_size=64, intermediate_size=96, num_attention_heads=4)
_PLAIN = dict(vocab_size=64, num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
_EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
_MLA = dict(kv_lora_rank=24, q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=20, num_key_value_heads=4)
_DEEPSEEK = _SIZES | _EXPERTS | _MLA | dict(n_group=1, topk_group=1)
_INDEXED = _DEEPSEEK | dict(first_k_dense_replace=1, index_head_dim=12, index_n_heads=2, index_topk=4)
_GROUPED = _SIZES | dict(num_key_value_heads=2)
_MAMBA_2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)
_DELTA = dict(head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=12)
_HYBRID_TYPES = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ALTERNATING = ["sliding_attention", "full_attention"] * 2

CONFIGS = {
    "llama": _GROUPED,
    "opt": _PLAIN | dict(ffn_dim=96, word_embed_proj_dim=64),
    "bloom": dict(vocab_size=64, n_layer=2, hidden_size=64, n_head=4),
    "mpt": dict(vocab_size=64, n_layers=2, d_model=64, n_heads=4),
    "gpt_neo": dict(
        vocab_size=64, num_layers=2, hidden_size=64, num_heads=4, window_size=4, attention_types=[[["global", "local"], 1]]
    ),
    "gpt_bigcode": dict(vocab_size=64, n_layer=2, n_embd=64, n_head=4, multi_query=True),
    "falcon": _PLAIN | dict(multi_query=True, new_decoder_architecture=False),
    "mistral": _GROUPED | dict(sliding_window=8),
    "qwen2": _GROUPED | dict(use_sliding_window=True, sliding_window=8, max_window_layers=2),
    "gemma3_text": _GROUPED | dict(head_dim=12, sliding_window=8, sliding_window_pattern=2),
    "gemma3n_text": _GROUPED
    | dict(
        head_dim=16,
        sliding_window=8,
        num_kv_shared_layers=2,
        layer_types=_ALTERNATING,
        laurel_rank=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gemma4_text": _GROUPED
    | dict(
        head_dim=16,
        global_head_dim=32,
        sliding_window=8,
        num_kv_shared_layers=2,
        layer_types=_ALTERNATING,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
    ),
    "llama4_text": _GROUPED | dict(head_dim=16, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=32),
    "mimo_v2_flash": _GROUPED | _EXPERTS | dict(head_dim=16, v_head_dim=8, sliding_window=8),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK | dict(first_k_dense_replace=1),
    "minicpm3": _SIZES | _MLA | dict(v_head_dim=16),
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": _INDEXED,
    "jamba": _GROUPED
    | dict(
        num_experts=2,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_d_state=8,
        mamba_d_conv=4,
        mamba_expand=2,
        use_mamba_kernels=False,
    ),
    "mamba": dict(vocab_size=64, num_hidden_layers=2, hidden_size=64, state_size=8),
    "falcon_mamba": dict(vocab_size=64, num_hidden_layers=2, hidden_size=64, state_size=8),
    "mamba2": dict(vocab_size=64, num_hidden_layers=2, hidden_size=64, state_size=8, num_heads=8, head_dim=16, n_groups=2),
    "bamba": _GROUPED | _MAMBA_2 | dict(attn_layer_indices=[2]),
    "falcon_h1": _GROUPED | _MAMBA_2 | dict(mamba_d_ssm=128),
    "zamba": _SIZES | dict(num_key_value_heads=4, layers_block_type=_HYBRID_TYPES, mamba_d_state=8, n_mamba_heads=2),
    "zamba2": _SIZES
    | dict(
        num_key_value_heads=4, layers_block_type=_HYBRID_TYPES, mamba_d_state=8, n_mamba_heads=8, mamba_ngroups=1, num_mem_blocks=1
    ),
    "nemotron_h": dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        hybrid_override_pattern="M*-M",
        head_dim=12,
        num_key_value_heads=2,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
    ),
    "granitemoehybrid": _GROUPED
    | _MAMBA_2
    | dict(
        layer_types=["mamba", "attention", "mamba", "mamba"],
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
    ),
    "qwen3_next": _GROUPED
    | _DELTA
    | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3_5_text": _GROUPED | _DELTA,
    "olmo_hybrid": _GROUPED | dict(pad_token_id=0),
    "kimi_linear": _SIZES
    | _EXPERTS
    | _MLA
    | dict(
        linear_num_heads=4,
        linear_head_dim=12,
        num_experts=4,
        first_k_dense_replace=1,
        pad_token_id=0,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    ),
    "minimax": _GROUPED | dict(head_dim=16, num_local_experts=2),
    "lfm2": _GROUPED | dict(layer_types=["conv", "full_attention", "conv", "conv"], conv_L_cache=3, block_multiple_of=8),
    "longcat_flash": dict(
        vocab_size=64,
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=32,
        zero_expert_num=2,
        moe_topk=2,
        expert_ffn_hidden_size=16,
        head_dim=8,
    )
    | {k: v for k, v in (_EXPERTS | _MLA).items() if k == "n_routed_experts" or k in _MLA},
    "deepseek_v4": _SIZES
    | _EXPERTS
    | dict(
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        q_lora_rank=16,
        o_lora_rank=16,
        o_groups=2,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        hc_mult=2,
        qk_rope_head_dim=8,
        layer_types=["sliding_attention", "heavily_compressed_attention"] + ["compressed_sparse_attention"] * 2,
    ),
}
