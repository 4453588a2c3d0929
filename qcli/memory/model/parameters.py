"""The parameters of a model, before there is a model: from config.json alone, or from a checkpoint's headers."""

from dataclasses import replace

from qcli.errors import UsageError
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families import families, shapes_of
from qcli.memory.model.headers import parameters_of
from qcli.memory.model.tensor_rules import Parameter, parameter

__all__ = ["Parameter", "parameters", "parameters_of"]


def parameters(config: ModelConfig) -> list[Parameter]:
    """Every parameter that transformers 5 builds from `config`, tied weights once.

    Raises UsageError for a model type without a family, and for a missing field.
    """
    shapes = shapes_of(config)
    if shapes is None:
        raise UsageError(
            f"{config.label}: neither qcli nor transformers knows the model type {config.model_type!r}; "
            f"qcli knows {', '.join(sorted(families()))}",
            "Give the folder or the hub id of a checkpoint in safetensors instead. Its headers are enough for any model.",
        )
    if config.text is not config.raw and not any("vision_tower" in name for name in shapes):
        config.assume(f"Only the language model of {config.label} is counted, not its parts for images or sound.")
    found = [parameter(name, shape, config) for name, shape in shapes.items()]
    # transformers takes the module of the last parameter for the head, and never converts it.
    found[-1] = replace(found[-1], quantizable=False)
    return found
