"""gpt-oss: attention sinks, biases everywhere, experts stored [in, out]."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, attention, norms

MODEL_TYPES = ("gpt_oss",)


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden, width, experts = config.hidden_size, config.intermediate_size, config.num_experts
    model.embedding("model.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        model.tensor(f"{at}.self_attn.sinks", config.heads)
        attention(model, f"{at}.self_attn", config, bias=config.get("attention_bias", default=True))
        model.linear(f"{at}.mlp.router", experts, hidden, bias=True)
        model.tensor(f"{at}.mlp.experts.gate_up_proj", experts, hidden, 2 * width)
        model.tensor(f"{at}.mlp.experts.gate_up_proj_bias", experts, 2 * width)
        model.tensor(f"{at}.mlp.experts.down_proj", experts, width, hidden)
        model.tensor(f"{at}.mlp.experts.down_proj_bias", experts, hidden)
        norms(model, at, ("input_layernorm", "post_attention_layernorm"), hidden)
    model.norm("model.norm", hidden)
    model.head(config, hidden)
