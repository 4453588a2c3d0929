"""What adapter_config.json must be for qcli to compute what PEFT does: each field that changes a result is checked, or refused."""

import warnings
from collections.abc import Mapping
from typing import Any

from qcli.errors import CheckpointError, QcliWarning
from qcli.files.foreign_json import FLAG, NUMBER, TEXT, Required, check, either, list_of, map_of, whole

CONFIG = "adapter_config.json"
WITH_PEFT = "Load it with PEFT."
_FIELDS = {
    "peft_type": Required(TEXT),
    "r": Required(whole(1)),
    "lora_alpha": Required(NUMBER),
    "use_rslora": FLAG,
    "rank_pattern": map_of(whole(1)),
    "alpha_pattern": map_of(NUMBER),
    "bias": TEXT,
    "base_model_name_or_path": TEXT,
    "revision": TEXT,
    "init_lora_weights": either(FLAG, TEXT),
    "modules_to_save": list_of(TEXT),
}
# Fields of adapter_config.json that change what a module computes, and what they are called.
_REFUSED = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "biases of its own",
    "modules_to_save": "whole modules beside the matrices",
    "trainable_token_indices": "rows of an embedding",
    "target_parameters": "parameters that are no linear modules",
    "layer_replication": "layers that occur several times",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow",
    "megatron_config": "Megatron's modules",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
# Fields that say how it was trained, or what the names of its tensors say anyway.
_OF_TRAINING = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules", "fan_in_fan_out"),
    "lora_dropout",
    *("layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "ensure_weight_tying", "runtime_config"),
}
# Ways to begin that leave the base as it is. Others subtract the beginning from it.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


def refused(label: str, what: str) -> CheckpointError:
    """The refusal of an adapter called `label`, which `what`."""
    return CheckpointError(f"{label} {what}, expected plain LoRA or rsLoRA on linear modules", WITH_PEFT)


def check_config(config: Mapping[str, Any], adapter: str) -> None:
    """Checks the fields of an adapter's config. Warns (QcliWarning) of those that it does not know.

    Raises CheckpointError for a field of another kind, and for what is more than LoRA or rsLoRA.
    """
    label, mend = f"{adapter}/{CONFIG}", "Mend it, or fetch it again."
    check(config, {"peft_type": Required(TEXT)}, label, mend)
    if config["peft_type"] != "LORA":
        raise refused(adapter, f"is an adapter of the kind {config['peft_type']}")
    for name, what in _REFUSED.items():
        if config.get(name):
            raise refused(adapter, f"has {what} ({name} in {CONFIG})")
    check(config, _FIELDS, label, mend)
    if (config.get("bias") or "none") != "none":
        raise refused(adapter, f"has trained biases (bias {config['bias']} in {CONFIG})")
    begun = config.get("init_lora_weights")
    if begun is not None and begun not in _BEGINNINGS:
        raise refused(adapter, f"begins with {begun}, which changes the base (init_lora_weights in {CONFIG})")
    if unknown := sorted(name for name in config.keys() - _FIELDS.keys() - _OF_TRAINING if config[name]):
        warnings.warn(f"{label} has {', '.join(unknown)}, which this qcli does not know and leaves out", QcliWarning, stacklevel=4)
