"""The format `pack-quantized` of compressed-tensors, which vLLM and transformers read.

For a weight [out_features, in_features] of b bits in groups of g, beside the module's other tensors:
  weight_packed      I32 [out_features, ceil(in_features b / 32)]   code + 2^(b-1), 32 / b codes a word, the first in the low bits
  weight_scale       the model's dtype [out_features, in_features / g]
  weight_zero_point  I32 [ceil(out_features b / 32), in_features / g]   likewise, packed along the rows; not where symmetric
  weight_shape       I64 [2]
config.json names the schemes in groups of modules, and what is left alone. Several groups may differ in bits, size and zero points.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import CODES, MODEL_DTYPES, TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.errors import CheckpointError
from qcli.files.foreign_json import FLAG, OBJECT, TEXT, Kind, Required, check, either, list_of, map_of, one_of, whole
from qcli.formats import Choice, Format, Stored, Weight
from qcli.schemes import NAMED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

_LAYOUT = "pack-quantized"
_HINT = "Load it with transformers."
_COMPANIONS = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    "format": Required(one_of(_LAYOUT)),
    "config_groups": Required(map_of(OBJECT)),
    "ignore": list_of(TEXT),
    "quantization_status": one_of("compressed"),
}
_GROUP: Mapping[str, Kind | Required] = {"targets": Required(list_of(TEXT)), "weights": Required(OBJECT), "format": one_of(_LAYOUT)}
_WEIGHTS: Mapping[str, Kind | Required] = {
    "num_bits": Required(one_of(4, 8)),
    "type": one_of("int"),
    "symmetric": FLAG,
    "strategy": one_of("group"),
    "group_size": Required(whole(1)),
    "actorder": one_of("weight", "static"),  # an order that was used while rounding, and is not stored
    "dynamic": either(FLAG),
}
_FLOATS = tuple(CODES[name] for name in MODEL_DTYPES)


class CompressedTensors:
    """See the module and qcli.formats.Format."""

    name = layout = "compressed-tensors"

    def refuses(self, scheme: Scheme) -> str | None:
        if scheme.share != "group" or scheme.bits not in (4, 8) or scheme.codebook or scheme.activations:
            return f"compressed-tensors' {_LAYOUT} holds integer codes of 4 or 8 bits in groups of a row, not {scheme.name}"
        return None

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        if in_features % scheme.size == 0:
            return None
        fitting = [size for size in (128, 64, 32) if in_features % size == 0]
        advice = f"; a group size of {fitting[0]} does" if fitting else ""
        return f"groups of {scheme.size} do not divide rows of {in_features}{advice}"

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        if reason := self.refuses(head):
            return reason
        return f"{self.name} has no quantized embedding, and the head is tied to it" if tied else None

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        module, groups = weight.name.removesuffix("weight"), weight.in_features // scheme.size
        specs = [
            TensorSpec(f"{module}weight_packed", "I32", (weight.out_features, _words(weight.in_features, scheme))),
            TensorSpec(f"{module}weight_scale", weight.dtype, (weight.out_features, groups)),
            TensorSpec(f"{module}weight_shape", "I64", (2,)),
        ]
        if scheme.zero_point:
            specs.append(TensorSpec(f"{module}weight_zero_point", "I32", (_words(weight.out_features, scheme), groups)))
        return specs

    def pack(
        self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int
    ) -> "Iterator[tuple[str, int, torch.Tensor]]":
        import torch

        from qcli.packing import pack_words

        module = weight.name.removesuffix("weight")
        if "codes" in parts:
            row = start // weight.in_features
            yield f"{module}weight_packed", row * 4 * _words(weight.in_features, scheme), pack_words(parts["codes"], scheme.bits)
        if "scale" not in parts:
            return
        yield f"{module}weight_scale", 0, parts["scale"]
        yield f"{module}weight_shape", 0, torch.tensor([weight.out_features, weight.in_features])
        if scheme.zero_point:
            packed = pack_words(parts["zero_point"].t().contiguous(), scheme.bits).t().contiguous()
            yield f"{module}weight_zero_point", 0, packed

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        groups: dict[Scheme, list[str]] = {}
        for module, scheme in choice.schemes.items():
            groups.setdefault(scheme, []).append(module)
        for linear in choice.layout.linears.values():
            if linear.transposed and linear.module in choice.schemes:
                choice.problems.append(f"{linear.module} is a Conv1D, and readers of compressed-tensors take nn.Linear alone")
                break
        if any(scheme.zero_point for scheme in groups):
            choice.notes.append(
                "transformers with compressed-tensors 0.20 does not load packed zero points; vLLM and compressed-tensors itself do"
            )
        left = {*choice.layout.default_skip, *choice.layout.candidates} - set(choice.schemes)
        return {
            "config_groups": {
                f"group_{number}": {
                    "targets": ["Linear"] if len(groups) == 1 else sorted(modules),
                    "weights": {
                        "num_bits": scheme.bits,
                        "type": "int",
                        "symmetric": not scheme.zero_point,
                        "strategy": "group",
                        "group_size": scheme.size,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                }
                for number, (scheme, modules) in enumerate(groups.items())
            },
            "format": _LAYOUT,
            "global_compression_ratio": None,
            "ignore": sorted(left),
            "kv_cache_scheme": None,
            "quant_method": self.name,
            "quantization_status": "compressed",
        }

    def owns(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.name

    def weight_name(self, tensor: str) -> str:
        return f"{tensor.removesuffix('_packed')}" if tensor.endswith(".weight_packed") else tensor

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        owners = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last in _COMPANIONS and f"{module}.weight_packed" in tensors:
                owners[name] = f"{module}.weight_packed"
        return owners

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        module = codes.removesuffix("weight_packed")
        scale = tensors.get(f"{module}weight_scale")
        if not codes.endswith(".weight_packed") or scale is None or len(scale.shape) != 2 or not scale.shape[1]:
            return None
        bits = _bits_for(module.removesuffix("."), config)
        size = tensors[codes].shape[-1] * 32 // bits // scale.shape[1]
        return replace(NAMED["rtn"], bits=bits, size=size, zero_point=f"{module}weight_zero_point" in tensors)

    def parameters_in(self, info: "TensorInfo", scheme: Scheme) -> int:
        return info.nbytes * 8 // scheme.bits

    def in_memory(self, spec: "TensorSpec | TensorInfo") -> bool:
        return not spec.name.endswith("weight_shape")

    def in_module(self, spec: "TensorSpec | TensorInfo") -> bool:
        return True

    def check(self, config: Mapping[str, Any], label: str) -> None:
        check(config, _CONFIG, label, _HINT)
        for name, group in config["config_groups"].items():
            where = f"{label}.config_groups.{name}"
            check(group, _GROUP, where, _HINT)
            check(group["weights"], _WEIGHTS, f"{where}.weights", _HINT)
            if group.get("input_activations") is not None:
                raise CheckpointError(f"{where} rounds activations too, which qcli does not run", _HINT)

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        from qcli.formats._reading import read_each

        return read_each(source, linears, partial(self._read, config))

    def attribute(self, name: str) -> str:
        return "weight" if name == "weight_packed" else name

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        found: list[str] | None = config.get("ignore")
        return found

    def renamings(self) -> list[tuple[str, str]]:
        return [("weight_packed$", "weight")]

    def _read(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        from qcli.formats._reading import Problem, expect, present

        if not linear.tensor.endswith(".weight_packed"):
            return None
        module = linear.tensor.removesuffix("weight_packed")
        scheme = _scheme_for(linear.module, config)
        if scheme is None:
            raise Problem(f"{linear.tensor} is stored, and no group of the config targets {linear.module}")
        weight = Weight(f"{module}weight", linear.out_features, linear.in_features, "BF16")
        if reason := self.refuses_shape(scheme, linear.out_features, linear.in_features):
            raise Problem(f"{linear.tensor}: {reason}")
        for spec in self.tensors(weight, scheme):
            if spec.name not in source.tensors:
                raise Problem(f"{linear.tensor} lacks {spec.name}")
            expect(source, spec.name, _FLOATS if spec.name.endswith("scale") else (spec.dtype,), spec.shape)
        stray = f"{module}weight_zero_point"
        if not scheme.zero_point and stray in source.tensors:
            raise Problem(f"{stray} is stored, and the config says symmetric")
        names = {self.attribute(name): f"{module}{name}" for name in ("weight_packed", *_COMPANIONS)}
        return Stored(self.name, scheme, linear.out_features, linear.in_features, present(source, names))


def _words(count: int, scheme: Scheme) -> int:
    """32-bit words for `count` codes."""
    return -(-count * scheme.bits // 32)


def _scheme_for(module: str, config: Mapping[str, Any]) -> Scheme | None:
    """The scheme of the group that targets a module by its name, by a pattern, or as any Linear."""
    for group in config["config_groups"].values():
        for target in group["targets"]:
            if target in ("Linear", module) or (target.startswith("re:") and re.match(target[3:], module)):
                weights = group["weights"]
                symmetric = weights.get("symmetric")
                return replace(NAMED["rtn"], bits=weights["num_bits"], size=weights["group_size"], zero_point=symmetric is False)
    return None


def _bits_for(module: str, config: Mapping[str, Any] | None) -> int:
    """Bits of a code, which headers do not show, by an unchecked config; 4, which nearly all files have, where it does not say."""
    try:
        scheme = _scheme_for(module, config or {})
    except (AttributeError, KeyError, TypeError, re.error):
        return 4
    return scheme.bits if scheme and scheme.bits in (4, 8) else 4


FORMAT: Format = CompressedTensors()
