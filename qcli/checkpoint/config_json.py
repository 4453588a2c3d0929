"""Checks config.json: the fields that qcli itself reads, in the config and in each of its sub-configs.

The configuration classes of transformers read all other fields and check them.
"""

import re
from collections.abc import Iterator

from qcli.errors import CheckpointError
from qcli.files.foreign_json import FLAG, OBJECT, TEXT, Kind, check, either, is_whole, list_of, map_of

TEXT_OR_NULL = Kind("a string or null", lambda v: v is None or TEXT.fits(v))
HINT = "Mend the file, or fetch it again."
_OUTER = {
    "architectures": list_of(TEXT),
    "model_type": TEXT,
    "quantization_config": OBJECT,
    "auto_map": map_of(either(TEXT, list_of(TEXT_OR_NULL))),
    "is_encoder_decoder": FLAG,
    "tie_word_embeddings": FLAG,
}
_EVERY_PART = {"model_type": TEXT, "dtype": TEXT, "torch_dtype": TEXT, "layer_types": list_of(TEXT)}
# Fields that count layers, experts or labels. They are compared with the stored tensors before the model is built.
_COUNT = re.compile(r"(^|_)(n_?layers?|layers?|depths?|n_?blocks|num_blocks|stages|experts?|labels)$")
_DEPTH = re.compile(r"(num_hidden_layers|num_layers|n_layers?)$")
_FLOATS = ("Infinity", "-Infinity", "NaN")
_DEEPEST = 8  # objects within objects


def check_config(config: dict, label: str) -> None:
    """Raises CheckpointError for a field whose type the model's loaders do not accept. The message names the sub-config."""
    check(config, _OUTER, label, HINT)
    for path, part in parts(config):
        check(part, _EVERY_PART, f"{label}: {path}" if path else label, HINT)


def parts(config: dict, path: str = "", depth: int = 0) -> Iterator[tuple[str, dict]]:
    """(dotted path, object) of `config` itself, whose path is "", and of each of its sub-configs at any depth.

    `quantization_config` is not a sub-config: it belongs to the format.
    """
    yield path, config
    for name, value in config.items():
        if isinstance(value, dict) and name != "quantization_config" and depth < _DEEPEST:
            yield from parts(value, f"{path}.{name}" if path else name, depth + 1)


def for_transformers(config: dict) -> dict:
    """A copy for transformers' configuration classes, which write infinity as {"__float__": "Infinity"}: here it is a float.

    An empty quantization_config is removed: transformers would take the model for a quantized one. `return_dict` is true, whatever
    the file says: it changes no number, and without it a model returns bare tuples.
    """

    def decoded(value: object) -> object:
        if isinstance(value, dict):
            if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
                return float(value["__float__"])
            return {name: decoded(item) for name, item in value.items()}
        return [decoded(item) for item in value] if isinstance(value, list) else value

    made = decoded(config)
    if not made.get("quantization_config"):
        made.pop("quantization_config", None)
    for _, part in parts(made):
        if "return_dict" in part:
            part["return_dict"] = True
    return made


def check_counts(config: dict, tensors: int, widest: int, label: str) -> None:
    """Raises CheckpointError where the config claims more layers, experts or labels than the stored tensors can provide, or where
    the model or its text part has no layer at all.

    Each needs a tensor of its own, or a row of one. `tensors` is the number of tensors, `widest` the largest size in any shape.
    Without this check a damaged count would be built, module by module, until memory runs out.
    """
    most = max(tensors, widest)
    for path, part in parts(config):
        for name, value in part.items():
            if is_whole(value) and value < 1 and path in ("", "text_config") and _DEPTH.match(name):
                raise CheckpointError(f"{label}: {f'{path}.' if path else ''}{name} is {value}, expected at least 1", HINT)
            if is_whole(value) and value > most and _COUNT.search(name):
                raise CheckpointError(
                    f"{label}: {f'{path}.' if path else ''}{name} is {value:,}, but the checkpoint holds {tensors:,} tensors, "
                    f"none wider than {widest:,}",
                    HINT,
                )


def live_auto_map(auto_map: object, files: list[str]) -> dict | None:
    """The entries of an `auto_map` whose code is in `files` or in another repository. None where no entry is left.

    An entry is "module.Class", or a list of two such names (or null) for a slow and a fast tokenizer.
    """

    def lives(entry: object) -> bool:
        references = entry if isinstance(entry, list) else [entry]
        return all(
            reference is None
            or (isinstance(reference, str) and ("--" in reference or f"{reference.partition('.')[0]}.py" in files))
            for reference in references
        )

    if not isinstance(auto_map, dict):
        return None
    return {name: entry for name, entry in auto_map.items() if lives(entry)} or None
