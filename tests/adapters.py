"""LoRA adapters with random weights, saved by PEFT."""

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file


def make_adapter(model: torch.nn.Module, folder: Path, **config) -> peft.PeftModel:
    """An adapter on `model`, of all linear modules unless the config names others, saved to `folder`. Returns PEFT's model."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def change_config(folder: Path, **fields) -> None:
    """Sets fields of an adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensors(folder: Path, change) -> None:
    """Saves what `change` makes of an adapter's tensors."""
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})
