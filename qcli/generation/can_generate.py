"""Whether a model can continue a text. Its class in transformers decides, before any weight is read."""

import transformers

from qcli.errors import CheckpointError

_HINT = "qcli generate runs models that continue a text."


def check_can_generate(config: dict, label: str, trust_remote_code: bool = False) -> None:
    """Raises CheckpointError if the model of this config.json reads no text or writes none: encoders, speech and image models.

    Two kinds of models pass unchecked: those whose code comes with the checkpoint, and those that transformers does not know.
    """
    if trust_remote_code and config.get("auto_map"):
        return
    named, kind = config.get("architectures"), config.get("model_type")
    name = named[0] if named else None
    known = getattr(transformers, name, None) if name else None
    if known is not None:
        check_class(known, label)
    elif kind in transformers.CONFIG_MAPPING and not _continues_text(transformers.CONFIG_MAPPING[kind]):
        raise CheckpointError(f"{label} cannot generate: transformers has no model of type {kind} that writes text", _HINT)


def _continues_text(config_class: type) -> bool:
    return config_class in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def check_class(model_class: type, label: str) -> None:
    """Like `check_can_generate`, for a model's class."""
    name = model_class.__name__
    try:
        writes = model_class.can_generate()
    except AttributeError:  # not a model, or not one of transformers' classes
        return
    except ImportError as e:
        raise CheckpointError(f"{label} cannot be run: {' '.join(str(e).split())}") from e
    reads = model_class.main_input_name
    if not writes:
        raise CheckpointError(f"{label} cannot generate: {name} does not write text", _HINT)
    if reads != "input_ids" or not _includes_text(getattr(model_class, "input_modalities", None)):
        raise CheckpointError(f"{label} cannot generate from a prompt: {name} reads {reads}, not text alone", _HINT)
    if not _includes_text(getattr(model_class, "output_modalities", None)):
        raise CheckpointError(f"{label} cannot generate: {name} writes {_listed(model_class.output_modalities)}, not text", _HINT)


def _includes_text(modalities: str | tuple[str, ...] | None) -> bool:
    return modalities is None or "text" in _listed(modalities)


def _listed(modalities: str | tuple[str, ...]) -> str:
    return modalities if isinstance(modalities, str) else ", ".join(modalities)
