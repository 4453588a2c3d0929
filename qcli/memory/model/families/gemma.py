"""Gemma 1, 2 and 3. Gemma 3 comes as a text model and with a SigLIP tower for images."""

from qcli.errors import UsageError
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families import _siglip
from qcli.memory.model.families._shapes import Shapes, attention, gated_mlp, norms

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gemma3")
_AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


def shapes(config: ModelConfig, model: Shapes) -> None:
    hidden = config.hidden_size
    multimodal = config.raw.get("model_type") == "gemma3"
    prefix = "model.language_model" if multimodal else "model"
    if multimodal:
        width = _siglip.shapes(_vision(config), model, "model.vision_tower")
        model.tensor("model.multi_modal_projector.mm_input_projection_weight", width, hidden)
        model.norm("model.multi_modal_projector.mm_soft_emb_norm", width)
    model.embedding(f"{prefix}.embed_tokens", config.vocab_size, hidden)
    for i in range(config.layers):
        at = f"{prefix}.layers.{i}"
        attention(model, f"{at}.self_attn", config, bias=config.get("attention_bias", default=False))
        if config.model_type.startswith("gemma3"):
            norms(model, f"{at}.self_attn", ("q_norm", "k_norm"), config.head_dim)
        gated_mlp(model, f"{at}.mlp", hidden, config.intermediate_size)
        norms(model, at, _AROUND[:2] if config.model_type == "gemma" else _AROUND, hidden)
    model.norm(f"{prefix}.norm", hidden)
    model.head(config, hidden)


def _vision(config: ModelConfig) -> ModelConfig:
    given = config.raw.get("vision_config") or {}
    if not isinstance(given, dict):
        raise UsageError(f"vision_config in {config.label} is a {type(given).__name__}, expected an object.")
    return ModelConfig({"model_type": "siglip_vision_model"} | given, f"vision_config of {config.label}")
