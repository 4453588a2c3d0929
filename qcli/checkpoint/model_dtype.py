"""The dtype of a model: as its config and its weights have it."""

from qcli.checkpoint import config_json, dtypes
from qcli.errors import PlanError

_LANGUAGE = ("text_config", "language_config", "llm_config", "decoder")  # parts whose dtype speaks for the model


def model_dtype(source, dtype: str) -> str:
    """The safetensors code of the model's dtype: as asked, else what the config states, else that of most of the weights.

    The outermost statement holds, as for transformers. Without one, the parts of a composite model decide where they agree and the
    language model is among them or several speak; else the weights do. Raises PlanError for a stated dtype that no model is run in.
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
        if dtypes.CODES.get(name) not in dtypes.FLOAT8:  # which weights may be stored in, and no model is run in
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
