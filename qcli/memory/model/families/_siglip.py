"""The SigLIP vision tower, with the defaults of transformers' SiglipVisionConfig."""

from qcli.errors import UsageError
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families._shapes import Shapes, norms

_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}


def shapes(vision: ModelConfig, model: Shapes, at: str) -> int:
    """Adds the tower of a vision_config to `model`, and returns its width. Raises UsageError."""
    field = {name: vision.integer(name, default=default) for name, default in _SIZES.items()}
    width, inner, patch = field["hidden_size"], field["intermediate_size"], field["patch_size"]
    if not patch:
        raise UsageError(f"patch_size in {vision.label} is 0, expected at least 1.")
    model.tensor(f"{at}.embeddings.patch_embedding.weight", width, field["num_channels"], patch, patch)
    model.tensor(f"{at}.embeddings.patch_embedding.bias", width)
    model.embedding(f"{at}.embeddings.position_embedding", (field["image_size"] // patch) ** 2, width)
    for i in range(field["num_hidden_layers"]):
        block = f"{at}.encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            model.linear(f"{block}.self_attn.{name}", width, width, bias=True)
        _mlp(model, f"{block}.mlp", width, inner)
        norms(model, block, ("layer_norm1", "layer_norm2"), width, bias=True)
    model.norm(f"{at}.post_layernorm", width, bias=True)
    if vision.get("vision_use_head", default=True):
        model.tensor(f"{at}.head.probe", 1, 1, width)
        model.tensor(f"{at}.head.attention.in_proj_weight", 3 * width, width)
        model.tensor(f"{at}.head.attention.in_proj_bias", 3 * width)
        model.linear(f"{at}.head.attention.out_proj", width, width, bias=True)
        model.norm(f"{at}.head.layernorm", width, bias=True)
        _mlp(model, f"{at}.head.mlp", width, inner)
    return width


def _mlp(model: Shapes, at: str, width: int, inner: int) -> None:
    model.linear(f"{at}.fc1", inner, width, bias=True)
    model.linear(f"{at}.fc2", width, inner, bias=True)
