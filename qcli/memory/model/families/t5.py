"""T5: an encoder and a decoder over one embedding. v1.0 has a ReLU MLP and a tied head, v1.1 a gated MLP and its own.

transformers 5 calls both tied, and unties them where a checkpoint holds two that differ. Here the config's field decides.
"""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes

MODEL_TYPES = ("t5",)


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden = config.hidden_size
    model.embedding("shared", config.vocab_size, hidden)
    for stack, layers in (("encoder", config.encoder_layers), ("decoder", config.layers)):
        for i in range(layers):
            block = f"{stack}.block.{i}.layer"
            attentions = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
            for sub, name in enumerate(attentions):
                _attention(model, f"{block}.{sub}.{name}", config, positions=i == 0 and sub == 0)
                model.norm(f"{block}.{sub}.layer_norm", hidden)
            _mlp(model, f"{block}.{len(attentions)}.DenseReluDense", config)
            model.norm(f"{block}.{len(attentions)}.layer_norm", hidden)
        model.norm(f"{stack}.final_layer_norm", hidden)
    model.head(config, hidden)


def _attention(model: Shapes, at: str, config: ModelConfig, positions: bool) -> None:
    inner = config.heads * config.head_dim
    for name in ("q", "k", "v"):
        model.linear(f"{at}.{name}", inner, config.hidden_size)
    model.linear(f"{at}.o", config.hidden_size, inner)
    if positions:
        buckets = config.integer("relative_attention_num_buckets", default=32)
        model.embedding(f"{at}.relative_attention_bias", buckets, config.heads)


def _mlp(model: Shapes, at: str, config: ModelConfig) -> None:
    gated = str(config.get("feed_forward_proj", default="relu")).startswith("gated")
    for name in ("wi_0", "wi_1") if gated else ("wi",):
        model.linear(f"{at}.{name}", config.intermediate_size, config.hidden_size)
    model.linear(f"{at}.wo", config.hidden_size, config.intermediate_size)
