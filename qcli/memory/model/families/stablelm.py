"""StableLM: Llama's blocks with LayerNorms, optional biases of q, k and v, and a norm for each head."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, attention, gated_mlp, norms

MODEL_TYPES = ("stablelm",)


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden = config.hidden_size
    parallel = config.get("use_parallel_residual", default=False)
    model.embedding("model.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        attention(model, f"{at}.self_attn", config, bias=config.get("use_qkv_bias", default=False), output_bias=False)
        if config.get("qk_layernorm", default=False):
            for name, heads in (("q", config.heads), ("k", config.kv_heads)):
                norms(model, f"{at}.self_attn.{name}_layernorm.norms", map(str, range(heads)), config.head_dim)
        gated_mlp(model, f"{at}.mlp", hidden, config.intermediate_size)
        model.norm(f"{at}.input_layernorm", hidden, bias=True)
        if not parallel:
            model.norm(f"{at}.post_attention_layernorm", hidden, bias=True)
    model.norm("model.norm", hidden, bias=True)
    model.head(config, hidden)
