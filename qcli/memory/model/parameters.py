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

    Raises UsageError for a family that is not known here and for a missing field.
    """
    shapes = shapes_of(config)
    if shapes is None:
        raise UsageError(
            f"{config.label}: the parameters of the model type {config.model_type!r} do not follow from its config alone here; "
            f"known are {', '.join(sorted(families()))}",
            "Give the folder or the hub id of a checkpoint in safetensors instead: its headers say it for any model.",
        )
    if config.text is not config.raw and not any("vision_tower" in name for name in shapes):
        config.assume(f"Only the language model of {config.label} is counted, not what reads images or sound.")
    found = [parameter(name, shape, config) for name, shape in shapes.items()]
    # transformers never converts the module of the last parameter, which it takes for the head's.
    found[-1] = replace(found[-1], quantizable=False)
    return found
