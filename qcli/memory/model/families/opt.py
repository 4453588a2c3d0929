"""OPT: learned positions, two rows more than the context. OPT-350M projects its embeddings."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes

MODEL_TYPES = ("opt",)
_POSITION_OFFSET = 2


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden, width, bias = config.hidden_size, config.intermediate_size, config.get("enable_bias", default=True)
    embedded = config.integer("word_embed_proj_dim", default=hidden)
    affine = config.get("layer_norm_elementwise_affine", default=True)
    at = "model.decoder"
    model.embedding(f"{at}.embed_tokens", config.vocab_size, embedded)
    model.embedding(f"{at}.embed_positions", config.integer("max_position_embeddings") + _POSITION_OFFSET, hidden)
    if embedded != hidden:
        model.linear(f"{at}.project_out", embedded, hidden)
        model.linear(f"{at}.project_in", hidden, embedded)
    final = config.get("do_layer_norm_before", default=True) and not config.get("_remove_final_layer_norm", default=False)
    if final and affine:
        model.norm(f"{at}.final_layer_norm", hidden, bias=True)
    for i in range(config.layers):
        block = f"{at}.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            model.linear(f"{block}.self_attn.{name}", hidden, hidden, bias)
        model.linear(f"{block}.fc1", width, hidden, bias)
        model.linear(f"{block}.fc2", hidden, width, bias)
        if affine:
            model.norm(f"{block}.self_attn_layer_norm", hidden, bias=True)
            model.norm(f"{block}.final_layer_norm", hidden, bias=True)
    model.head(config, embedded)
