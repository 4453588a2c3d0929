"""The groups of a compressed-tensors config, both ways: what one says of weights and activations as a scheme."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qcli.errors import CheckpointError
from qcli.files.foreign_json import FLAG, OBJECT, TEXT, Kind, Required, check, either, list_of, one_of, whole
from qcli.schemes import NAMED, Scheme

PACKED, PLAIN_INT, PLAIN_FLOAT = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
NAIVE, MIXED = "naive-quantized", "mixed-precision"
LAYOUTS = (PACKED, PLAIN_INT, PLAIN_FLOAT, NVFP4, MXFP4, MXFP8, NAIVE)

_HINT = "Load it with transformers."
_STRATEGIES = {"tensor": "tensor", "channel": "row", "group": "group", "tensor_group": "group", "block": "block"}
_GROUP: Mapping[str, Kind | Required] = {
    "targets": Required(list_of(TEXT)),
    "weights": Required(OBJECT),
    "input_activations": OBJECT,
    "format": one_of(*LAYOUTS),
}
_WEIGHTS: Mapping[str, Kind | Required] = {
    "num_bits": Required(whole(2, 8)),
    "type": one_of("int", "float"),
    "symmetric": FLAG,
    "strategy": Required(one_of(*_STRATEGIES)),
    "group_size": whole(-1),
    "block_structure": list_of(whole(1), 2),
    # "group" stores the order of the columns. The others were used while rounding, and are not stored.
    "actorder": either(FLAG, one_of("weight", "static", "group", "dynamic")),
    "dynamic": either(FLAG),
}
_ACTIVATIONS: Mapping[str, Kind | Required] = {
    "num_bits": Required(one_of(4, 8)),
    "type": one_of("int", "float"),
    "symmetric": FLAG,
    "strategy": Required(one_of("tensor", "token", "group", "tensor_group")),
    "dynamic": either(FLAG, one_of("local")),
}


@dataclass(frozen=True)
class Group:
    """A scheme, the layout of its tensors, and which modules have it."""

    scheme: Scheme
    layout: str
    targets: tuple[str, ...]

    def holds(self, module: str, kind: str = "Linear") -> bool:
        """Whether a target is the module's name, a pattern of its beginning, or the name of its class."""
        return any(t in (kind, module) or (t.startswith("re:") and re.match(t[3:], module)) for t in self.targets)


def groups_of(config: Mapping[str, Any]) -> list[Group]:
    """The groups of a checked config. Raises what a wrong type raises, in an unchecked one."""
    return [_group(group, config["format"]) for group in config["config_groups"].values()]


def group_for(module: str, config: Mapping[str, Any]) -> Group | None:
    """The first group that targets a module by its name, by a pattern or as a Linear."""
    return next((group for group in groups_of(config) if group.holds(module)), None)


def one_number_of_bits(config: Mapping[str, Any] | None) -> int | None:
    """The bits that all groups of an unchecked config state, if they state the same."""
    try:
        found = {group["weights"]["num_bits"] for group in (config or {})["config_groups"].values()}
    except (AttributeError, KeyError, TypeError):
        return None
    bits = found.pop() if len(found) == 1 else None
    return bits if isinstance(bits, int) and 2 <= bits <= 8 else None


def check_group(group: Mapping[str, Any], label: str) -> None:
    """Raises CheckpointError for fields that are wrong, and for what qcli does not run."""
    check(group, _GROUP, label, _HINT)
    weights, activations = group["weights"], group.get("input_activations")
    for target in group["targets"]:
        _check_pattern(target, f"{label}.targets")
    check(weights, _WEIGHTS, f"{label}.weights", _HINT)
    bits, is_float, strategy = weights["num_bits"], weights.get("type") == "float", weights["strategy"]
    if is_float and bits not in (4, 8):
        raise CheckpointError(f"{label} has floats of {bits} bits, expected 4 or 8", _HINT)
    if strategy in ("group", "tensor_group") and not (weights.get("group_size") or 0) > 0:
        raise CheckpointError(f"{label}.weights has the strategy {strategy} and no group_size", _HINT)
    if strategy == "block" and len(set(weights.get("block_structure") or ())) != 1:
        raise CheckpointError(f"{label}.weights has blocks of {weights.get('block_structure')}, expected squares", _HINT)
    if is_float and weights.get("symmetric") is False:
        raise CheckpointError(f"{label}.weights has floats with zero points", _HINT)
    if activations is not None:
        check(activations, _ACTIVATIONS, f"{label}.input_activations", _HINT)
        static = activations.get("dynamic") is False
        if activations.get("symmetric") is False or (static and activations["strategy"] != "tensor"):
            raise CheckpointError(f"{label} rounds activations in a way that qcli does not run", _HINT)


def _check_pattern(target: str, label: str) -> None:
    try:
        re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
    except re.error as e:
        raise CheckpointError(f"{label}: {target!r} is no regular expression: {e}", _HINT) from None


def _group(group: Mapping[str, Any], layout: str) -> Group:
    return Group(_scheme(group["weights"], group.get("input_activations")), group.get("format") or layout, tuple(group["targets"]))


def _scheme(weights: Mapping[str, Any], activations: Mapping[str, Any] | None) -> Scheme:
    bits, is_float, strategy = weights["num_bits"], weights.get("type") == "float", weights["strategy"]
    share = _STRATEGIES[strategy]
    size = weights["block_structure"][0] if share == "block" else weights["group_size"] if share == "group" else 0
    scale = "e4m3" if strategy == "tensor_group" else "e8m0" if is_float and share == "group" and size == 32 else "model"
    rounds = None
    if activations is not None:
        static = activations.get("dynamic") is False
        rounds = "static" if static else "group" if "group" in activations["strategy"] else activations["strategy"]
    found = Scheme(
        _name(bits, is_float, activations, scale),
        "rtn",
        bits,
        share,  # type: ignore[arg-type]
        size,
        codebook={4: "e2m1", 8: "e4m3"}[bits] if is_float else None,
        zero_point=weights.get("symmetric") is False,
        scale=scale,  # type: ignore[arg-type]
        activations=rounds,  # type: ignore[arg-type]
        activation_codebook=_activation_codebook(activations),
    )
    return found


def _activation_codebook(activations: Mapping[str, Any] | None) -> str | None:
    if activations is None or activations.get("type", "int") == "int":
        return None
    return {4: "e2m1", 8: "e4m3"}[activations["num_bits"]]


def _name(bits: int, is_float: bool, activations: Mapping[str, Any] | None, scale: str) -> str:
    """The name of qcli's own scheme of these numbers, else the field's: bits of weights and of activations."""
    if is_float:
        return {"e4m3": "nvfp4", "e8m0": f"mxfp{bits}"}.get(scale, f"fp{bits}")
    if activations is None:
        return f"w{bits}a16"
    if bits == 8 and activations.get("type", "int") == "int":
        return NAMED["int8"].name
    return f"w{bits}a{'fp' if activations.get('type') == 'float' else ''}{activations['num_bits']}"


def layout_of(scheme: Scheme) -> str:
    """The layout that holds `scheme`."""
    if scheme.codebook == "e2m1":
        return MXFP4 if scheme.scale == "e8m0" else NVFP4
    if scheme.codebook == "e4m3":
        return PLAIN_FLOAT
    return PLAIN_INT if scheme.activations else PACKED


def group_config(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """The group of config.json for modules of a scheme."""
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "float" if scheme.codebook else "int",
        "symmetric": not scheme.zero_point,
        "strategy": {"row": "channel", "group": "tensor_group" if scheme.scale == "e4m3" else "group"}.get(
            scheme.share, scheme.share
        ),
        "group_size": scheme.size if scheme.share == "group" else None,
        "dynamic": False,
    }
    if scheme.share == "block":
        weights["block_structure"] = [scheme.size, scheme.size]
    if scheme.scale in ("e8m0", "e4m3"):
        weights["scale_dtype"] = {"e8m0": "torch.uint8", "e4m3": "torch.float8_e4m3fn"}[scheme.scale]
    return {
        "targets": targets,
        "weights": {name: value for name, value in weights.items() if value is not None},
        "input_activations": _activations_config(scheme),
        "output_activations": None,
        "format": layout_of(scheme),
    }


def _activations_config(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activations is None:
        return None
    found: dict[str, Any] = {
        "num_bits": 4 if scheme.activation_codebook == "e2m1" else 8,
        "type": "float" if scheme.activation_codebook else "int",
        "symmetric": True,
        "strategy": scheme.activations,
        "dynamic": True,
    }
    if scheme.activations == "group":
        found["group_size"] = scheme.size
    if scheme.activation_codebook == "e2m1":
        found |= {"strategy": "tensor_group", "dynamic": "local", "scale_dtype": "torch.float8_e4m3fn"}
    return found


def reader_notes(schemes: Sequence[Scheme]) -> Iterator[str]:
    """What some reader will not like, by reader and version."""
    if any(scheme.codebook is None and scheme.bits not in (4, 8) for scheme in schemes):
        yield "integers of other bits than 4 and 8 need compressed-tensors 0.15; vLLM 0.32, by its source, a GPU and humming"
    if any(scheme.zero_point for scheme in schemes):
        yield "transformers 5.24 loads packed zero points only with CompressedTensorsConfig(dequantize=True)"
    weight_only = [s for s in schemes if s.codebook is None and s.activations is None]
    if any(scheme.share == "row" and scheme.bits == 4 for scheme in weight_only):
        yield "vLLM 0.32 on a CPU with AMX failed to load 4-bit rows of 320 without groups; without AMX it loads rows"
    if any(scheme.bits != 4 for scheme in weight_only):
        yield "vLLM 0.32 on a CPU loads integers of 4 bits alone, unless activations are rounded"
    if any(scheme.codebook == "e2m1" for scheme in schemes):
        yield "4-bit floats are fast on NVIDIA's Blackwell GPUs; vLLM 0.32 on a CPU does not load them"
    if any(scheme.codebook == "e4m3" and (scheme.share != "row" or not scheme.activations) for scheme in schemes):
        yield "vLLM 0.32 on a CPU without AMX loads FP8 only with a scale for each row, and with rounded activations"
    if any(scheme.scale == "e4m3" and scheme.activations for scheme in schemes):
        yield "the scale of activations as a whole is 1, since nothing was calibrated"
