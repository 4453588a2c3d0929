"""The dtype of a model, from its config or from its weights."""

from qcli.checkpoint import config_json, dtypes
from qcli.errors import PlanError

_LANGUAGE = ("text_config", "language_config", "llm_config", "decoder")  # sub-configs whose dtype decides for the model


def model_dtype(source, dtype: str) -> str:
    """The safetensors code of the model's dtype: `dtype` unless it is "auto", else the config's, else that of most weights.

    The config's top level decides if it states a dtype, as in transformers. Otherwise its sub-configs decide, if those that state
    a dtype agree, and the language model is among them or they are at least two. Otherwise the weights decide.
    Raises PlanError for a stated dtype in which no model runs.
    """
    if dtype != "auto":
        return dtypes.CODES[dtype]
    stated = {path: part.get("dtype") or part.get("torch_dtype") for path, part in config_json.parts(source.config)}
    stated = {path: name.removeprefix("torch.") for path, name in stated.items() if name}
    spoken = any(path.rpartition(".")[2] in _LANGUAGE for path in stated)
    found = {stated[""]} if "" in stated else set(stated.values()) if spoken or len(stated) > 1 else set()
    if len(found) == 1:
        name = found.pop()
        if name in dtypes.MODEL_DTYPES:
            return dtypes.CODES[name]
        if dtypes.CODES.get(name) not in dtypes.FLOAT8:  # weights may be stored in float8, but no model runs in it
            raise PlanError(
                source.label,
                [f"config.json says dtype {name!r}, expected one of {', '.join(dtypes.MODEL_DTYPES)}"],
                "Choose one with --dtype.",
            )
    count = {"F32": 0, "F16": 0, "BF16": 0}
    for info in source.tensors.values():
        if info.dtype in count:
            count[info.dtype] += info.numel
        elif info.dtype in dtypes.FLOAT8:
            count["BF16"] += info.numel
    return max(count, key=count.get)
