"""Which files of a folder or repository hold the model's weights: decided in one place, for every verb.

The first that exists: model.safetensors, the shards of its index, pytorch_model.bin, the shards of its index. These are
transformers' own names, in its order. Otherwise the only index, or the only safetensors file, whatever its name (a variant such
as model.fp16.safetensors). An adapter is not a model.
"""

import re
from collections.abc import Callable, Sequence

from qcli.errors import CheckpointError
from qcli.files.foreign_json import TEXT, Required, check, map_of

_NAMED = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
_VARIANT_INDEX = re.compile(r"[^/]+\.safetensors\.index(\.[\w-]+)?\.json")
_LOOSE = re.compile(r"(?!adapter_|optimizer)[^/]+\.safetensors")
OUTLIERS = "outliers.safetensors"  # tensors that other readers must not meet, if the index's metadata names it
_ADAPTER = "adapter_config.json"
_WITH_ADAPTER = "with --adapter {0} where the command takes one, or make one model of the two: qcli merge {0}"
_OTHER_FORMS = {"gguf": "GGUF", "onnx": "ONNX", "h5": "TensorFlow", "msgpack": "Flax", "pth": "torch's own"}


def find(names: Sequence[str], read_json: Callable[[str], dict], label: str) -> tuple[list[str], dict[str, str] | None, list[str]]:
    """(weight files in reading order, the index's weight_map or None, notes) of a place that has the files `names`.

    `read_json` gives the object in a JSON file. Raises CheckpointError.
    """
    present = set(names)
    notes = [f"{_ADAPTER}: the adapter beside the model is ignored"] if _ADAPTER in present else []
    for single, index in _NAMED:
        if single in present:
            return [single], None, notes
        if index in present:
            return *_shards(index, present, read_json, label), notes
    indexes = [n for n in names if _VARIANT_INDEX.fullmatch(n)]
    if len(indexes) == 1:
        return *_shards(indexes[0], present, read_json, label), notes
    loose = [n for n in names if _LOOSE.fullmatch(n)]
    if len(loose) == 1 and not indexes:
        return loose, None, notes
    raise _no_weights(names, loose, indexes, read_json, label)


def has_safetensors(names: Sequence[str]) -> bool:
    """Whether `find` would choose safetensors files. torch's own files would have to be fetched and loaded."""
    present = set(names)
    for (single, index), is_safe in zip(_NAMED, (True, False)):
        if single in present or index in present:
            return is_safe
    return any(_VARIANT_INDEX.fullmatch(n) or _LOOSE.fullmatch(n) for n in names)


def _shards(index: str, present: set[str], read_json: Callable[[str], dict], label: str) -> tuple[list[str], dict]:
    value = read_json(index)
    check(value, {"weight_map": Required(map_of(TEXT))}, f"{label}/{index}", "Mend it, or fetch the model again.")
    weight_map, metadata = value["weight_map"], value.get("metadata")
    beside = metadata.get("outlier_columns") if isinstance(metadata, dict) else None
    files = sorted(set(weight_map.values()))
    if beside == OUTLIERS and OUTLIERS not in files and files:
        if OUTLIERS not in present:
            raise CheckpointError(
                f"{label}/{index} names {OUTLIERS} for columns in 16 bits, and it is not there",
                "Fetch it, or quantize the model again.",
            )
        files.append(OUTLIERS)
    if not files:
        raise CheckpointError(f"{label}/{index}: weight_map is empty, expected tensor names and their files")
    for file in files:
        if "/" in file or "\\" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{label}/{index} names the shard {file!r}, outside its own folder", "Do not trust this model.")
    missing = [file for file in files if file not in present]
    if missing:
        raise CheckpointError(
            f"{label}/{index} names {len(missing)} shards that are not there: {', '.join(missing[:5])}",
            "Fetch them, or fetch the model again.",
        )
    return files, weight_map


def _no_weights(names, loose, indexes, read_json, label: str) -> CheckpointError:
    if _ADAPTER in names:
        return _is_adapter(read_json, label)
    several = indexes or loose
    found = f"; found {', '.join(several[:5])}, and nothing says which of them is the model" if several else ""
    others = sorted({word for n in names for end, word in _OTHER_FORMS.items() if n.endswith(f".{end}")})
    if others and not several:
        found = f"; found weights in {' and '.join(others)} form"
    hint = "Give the folder or repository that holds the weights as safetensors."
    if several:
        hint = "Put the files to use into their own folder, with config.json and the tokenizer."
    return CheckpointError(f"{label} has no model.safetensors, no pytorch_model.bin and no index of shards{found}", hint)


def _is_adapter(read_json: Callable[[str], dict], label: str) -> CheckpointError:
    config = read_json(_ADAPTER)
    base = config.get("base_model_name_or_path")
    known = f" of {base}" if isinstance(base, str) and base else ""
    return CheckpointError(
        f"{label} is an adapter{known}, not a model: it has {_ADAPTER} and no weights of a whole model",
        f"Give {base if known else 'its base model'} {_WITH_ADAPTER.format(label)}",
    )


def no_config(names: Sequence[str], label: str) -> CheckpointError:
    """The error for a place without config.json. Its hint names a folder that may be meant."""
    if _ADAPTER in names:
        return CheckpointError(
            f"{label} has no config.json: it is an adapter, not a model", f"Give its base model {_WITH_ADAPTER.format(label)}"
        )
    below = sorted((n for n in names if n.endswith("/config.json")), key=lambda n: (n.count("/"), n))
    snapshots = [n for n in below if n.startswith("snapshots/")]
    hint = "Give the folder or repository of a Hugging Face model."
    if snapshots:
        folders = [n.removesuffix("/config.json") for n in snapshots[:3]]
        hint = f"It is the root of a cache. The model is in {', '.join(f'{label}/{f}' for f in folders)}"
    elif below:
        folders = [n.removesuffix("/config.json") for n in below[:3]]
        hint = f"A config.json is in {', '.join(f'{label}/{f}' for f in folders)}: give that folder."
    elif any(n.endswith(".gguf") for n in names):
        hint = "It holds GGUF files: give the original model that they were made from."
    return CheckpointError(f"{label} has no config.json", hint)
