"""GPT-2, GPT-Neo, GPT-J and GPT-NeoX."""

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, norms

MODEL_TYPES = ("gpt2", "gpt_neo", "gptj", "gpt_neox")


def shapes(config: ModelConfig, model: Shapes) -> None:
    if config.model_type == "gpt_neox":
        return _neox(config, model)
    hidden, width, kind = config.hidden_size, config.intermediate_size, config.model_type
    model.embedding("transformer.wte", config.vocab_size, hidden)
    if kind != "gptj":  # which has rotary embeddings instead
        model.embedding("transformer.wpe", config.integer("n_positions", "max_position_embeddings"), hidden)
    for i in range(config.layers):
        at = f"transformer.h.{i}"
        norms(model, at, ("ln_1",) if kind == "gptj" else ("ln_1", "ln_2"), hidden, bias=True)
        if kind == "gpt2":
            model.conv1d(f"{at}.attn.c_attn", 3 * hidden, hidden)
            model.conv1d(f"{at}.attn.c_proj", hidden, hidden)
            model.conv1d(f"{at}.mlp.c_fc", width, hidden)
            model.conv1d(f"{at}.mlp.c_proj", hidden, width)
            continue
        attn = f"{at}.attn.attention" if kind == "gpt_neo" else f"{at}.attn"
        for name in ("k_proj", "v_proj", "q_proj"):
            model.linear(f"{attn}.{name}", hidden, hidden)
        model.linear(f"{attn}.out_proj", hidden, hidden, bias=kind == "gpt_neo")
        first, second = ("c_fc", "c_proj") if kind == "gpt_neo" else ("fc_in", "fc_out")
        model.linear(f"{at}.mlp.{first}", width, hidden, bias=True)
        model.linear(f"{at}.mlp.{second}", hidden, width, bias=True)
    model.norm("transformer.ln_f", hidden, bias=True)
    model.head(config, hidden, bias=kind == "gptj")


def _neox(config: ModelConfig, model: Shapes) -> None:
    hidden, width, bias = config.hidden_size, config.intermediate_size, config.get("attention_bias", default=True)
    model.embedding("gpt_neox.embed_in", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"gpt_neox.layers.{i}"
        norms(model, at, ("input_layernorm", "post_attention_layernorm"), hidden, bias=True)
        model.linear(f"{at}.attention.query_key_value", 3 * hidden, hidden, bias)
        model.linear(f"{at}.attention.dense", hidden, hidden, bias)
        model.linear(f"{at}.mlp.dense_h_to_4h", width, hidden, bias=True)
        model.linear(f"{at}.mlp.dense_4h_to_h", hidden, width, bias=True)
    model.norm("gpt_neox.final_layer_norm", hidden, bias=True)
    model.head(config, hidden)
