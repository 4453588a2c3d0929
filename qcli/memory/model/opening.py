"""A model to estimate: its config and its parameters, from as little as there is. No weight is read or downloaded."""

from dataclasses import dataclass, field
from pathlib import Path

from qcli.checkpoint.config_json import check_config
from qcli.errors import CheckpointError, UsageError
from qcli.files.foreign_json import read_object
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families import families
from qcli.memory.model.like_llama import from_size
from qcli.memory.model.parameters import Parameter, parameters, parameters_of
from qcli.memory.model.stored import as_stored


@dataclass(frozen=True)
class Model:
    """A model as an estimate sees it. `read` names what the parameters were counted from. `file_bytes` is the size of all weight
    files, None where none was seen. `files` are those on this machine."""

    label: str
    config: ModelConfig
    parameters: list[Parameter]
    read: str
    file_bytes: int | None = None
    files: list[Path] = field(default_factory=list)

    @property
    def parameter_count(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(parameter.numel for parameter in self.parameters)


def open_model(model: str | None, size: str | None = None, revision: str | None = None) -> Model:
    """The model that `model` names (a config.json, a folder, a hub id), or one like Llama of about `size` parameters ("7B").

    Parameters come from the headers of safetensors files, where the folder or repository has any. Otherwise they follow from
    config.json: by the rules of its family, or, for a model type without a family, from the model that transformers builds.
    Raises UsageError, CheckpointError, HubError.
    """
    if (model is None) == (size is None):
        found = "neither" if model is None else "both"
        raise UsageError(f"a model and --params: {found} given, expected one", "Name a model, or give --params 7B.")
    if model == "":
        raise UsageError("the name of the model is empty", "Name a config.json, a folder, or a model on the hub.")
    if size is not None:
        return _from_config(from_size(size), f"a model of {size}", "a shape like Llama's")
    path = Path(model)
    if path.is_file():
        if revision is not None:
            raise CheckpointError(f"{model} is a file, so there is no revision {revision!r}", "Leave out --revision.")
        config = ModelConfig(_read(path, model), model)
        return _from_config(config, model, "config.json alone")
    return _from_place(model, revision)


def _checked(config: ModelConfig) -> ModelConfig:
    if not isinstance(config.quantization, dict | None):
        raise CheckpointError(f"{config.label}: quantization_config is {config.quantization!r}, expected an object")
    return config


def _from_config(config: ModelConfig, label: str, read: str) -> Model:
    _checked(config)
    found = None
    if config.model_type not in families():
        from qcli.memory.model.built import built

        found = built(config)
        read = f"{read}, built by transformers"
    found = found or parameters(config)
    return Model(label, config, as_stored(found, config) if config.quantization else found, read)


def _from_place(model: str, revision: str | None) -> Model:
    from qcli.checkpoint import weight_files
    from qcli.checkpoint.source import Source, open_place

    place = open_place(model, revision)
    if "config.json" not in place.names:
        raise weight_files.no_config(place.names, model)
    if not weight_files.has_safetensors(place.names):
        raw = _read(place.local("config.json"), f"{model}/config.json")
        return _from_config(ModelConfig(raw, f"{model}/config.json"), model, "config.json alone, as there are no safetensors")
    source = Source(place, model, trust_remote_code=False)
    config = _checked(ModelConfig(source.config, f"{model}/config.json"))
    files = [] if place.is_hub else [place.weights(file) for file in source.files]
    return Model(
        label=model,
        config=config,
        parameters=parameters_of(source, config),
        read="safetensors headers",
        file_bytes=sum(place.size(file) for file in source.files),
        files=files,
    )


def _read(path: Path, label: str) -> dict:
    config = read_object(path, label, "Give a config.json, a folder or a hub id.")
    check_config(config, label)
    return config
