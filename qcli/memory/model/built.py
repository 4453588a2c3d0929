"""Parameters of a model type without a family: transformers builds the model on the meta device, which takes no memory.

That works for every model type that the installed transformers knows. Its price is the import of torch and transformers, which
takes seconds. Families need neither, and come first.
"""

import warnings
from dataclasses import replace
from types import SimpleNamespace

from qcli.checkpoint.config_json import for_transformers
from qcli.errors import CheckpointError, UsageError
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.tensor_rules import Parameter, parameter

_HINT = "Mend the file, or give the folder or the hub id of a checkpoint in safetensors: its headers are enough."
_MOST_TENSORS = 1_600  # qcli.checkpoint.modules lets so many make 100,000 modules; a mixture with single experts has half of that


def built(config: ModelConfig) -> list[Parameter] | None:
    """Every parameter that transformers builds from `config`, tied weights once; None for a model type that it does not know.

    Notes in `config.assumed` that transformers was asked. Raises UsageError where it cannot build the model.
    """
    import torch
    import transformers

    from qcli.checkpoint.modules import model_layout, modules_within, reason

    depth = config.layers  # a damaged one is refused before anything is built
    model_type = config.raw.get("model_type") or config.model_type
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    try:
        theirs = transformers.CONFIG_MAPPING[model_type].from_dict(for_transformers(config.raw))
    except Exception as e:  # transformers raises many kinds for a config that it cannot read
        raise UsageError(f"{config.label}: transformers cannot read it: {reason(e)}", _HINT) from e
    model_class = _model_class(config, theirs)
    asked = SimpleNamespace(label=config.label, tensors=range(_MOST_TENSORS))
    try:
        with torch.device("meta"), warnings.catch_warnings(), modules_within(asked):
            warnings.simplefilter("ignore")
            model = model_class(theirs)
        asked.tensors = {name: SimpleNamespace(shape=tuple(p.shape)) for name, p in model.named_parameters()}
        layout = model_layout(asked, model_class, theirs)
    except CheckpointError as e:
        name = model_class.__name__
        raise UsageError(f"{config.label}: {name} with these {depth:,} layers has more modules than any model", _HINT) from e
    except Exception as e:  # a config can be wrong in as many ways as there are models
        raise UsageError(f"{config.label}: transformers cannot build {model_class.__name__} of it: {reason(e)}", _HINT) from e
    config.assume(
        f"The parameters are those that transformers {transformers.__version__} builds for the model type {model_type!r}. "
        "This took seconds, because qcli has no rules of its own for that type."
    )
    converted = {linear.tensor for linear in layout.quantizable()}
    return [
        replace(
            parameter(name, info.shape, config),
            linear=name in layout.linears,
            quantizable=name in converted,
            keep_fp32=layout.stays_fp32(name, "F16"),
            transposed=name in layout.linears and layout.linears[name].transposed,
        )
        for name, info in asked.tensors.items()
    ]


def _model_class(config: ModelConfig, theirs) -> type:
    """The class that the file names; where transformers has none of that name, what it makes of the configuration."""
    import transformers

    named = getattr(transformers, config.architecture, None) if config.architecture else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    for mapping in (
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,  # the first, since the others hold the text part of such models
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_MAPPING,
    ):
        if type(theirs) in mapping:
            return mapping[type(theirs)]
    raise UsageError(
        f"{config.label}: transformers has no model for the model type {theirs.model_type!r}, and architectures names none", _HINT
    )
