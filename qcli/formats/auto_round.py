"""auto-round's own format: the tensors of another format, which `packing_format` names. It is read, not written.

auto_round:auto_gptq         GPTQ's, without g_idx; zero points are stored less 1
auto_round                   the same, with zero points as they are
auto_round:auto_awq          AWQ's
auto_round:llm_compressor    compressed-tensors': MXFP4, MXFP8 or NVFP4
auto_round:fp8, fp8_static   E4M3 with scales of blocks, or of rows with one scale of activations
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli import formats
from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.files.foreign_json import FLAG, TEXT, Kind, Required, either, list_of, one_of, whole
from qcli.formats import Format, Stored, Weight
from qcli.formats._columns import weight_name
from qcli.formats._plain import ReadOnly
from qcli.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

_FORMATS = {
    "auto_round:auto_gptq": "gptq",
    "auto_round": "gptq",
    "auto_round:auto_awq": "awq",
    "auto_round:llm_compressor": "compressed-tensors",
    "auto_round:fp8": "fp8",
    "auto_round:fp8_static": "compressed-tensors",
}
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    "packing_format": Required(one_of(*_FORMATS)),
    "bits": Required(whole(2, 8)),
    "group_size": either(whole(-1), list_of(whole(1), 2)),
    "sym": FLAG,
    "data_type": TEXT,
    "act_bits": whole(4, 32),
    "act_dynamic": FLAG,
}


class AutoRound(ReadOnly):
    """See the module and qcli.formats.Format."""

    name = "auto-round"
    library = "auto-round"
    fields = _CONFIG

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        raise NotImplementedError

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        raise NotImplementedError  # what it stores is said to be of the other format

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        raise NotImplementedError

    def weight_name(self, tensor: str) -> str:
        return weight_name(tensor.removesuffix("_packed") if tensor.endswith(".weight_packed") else tensor)

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in dict.fromkeys(_FORMATS.values()):
            found |= formats.get(name).companions(tensors)
        return found

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        if config is None or not self.owns(config) or not self.passes(config):
            return None
        other, theirs = _theirs(config)
        return other.scheme_of(codes, tensors, theirs)

    def check(self, config: Mapping[str, Any], label: str) -> None:
        super().check(config, label)
        other, theirs = _theirs(config)
        other.check(theirs, label)

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        other, theirs = _theirs(config)
        return other.read(source, linears, theirs)

    def attribute(self, name: str) -> str:
        return "weight" if name in ("qweight", "weight_packed") else name

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        return sorted(config.get("extra_config") or {}) or None

    def renamings(self) -> list[tuple[str, str]]:
        return [("qweight$", "weight"), ("weight_packed$", "weight")]


def _theirs(config: Mapping[str, Any]) -> tuple[Format, dict[str, Any]]:
    """The other format, and the config that says there what this one says."""
    packing, bits, size = config["packing_format"], config["bits"], config.get("group_size", -1)
    other = formats.get(_FORMATS[packing])
    symmetric = config.get("sym") is not False
    if other.name == "gptq":
        version = "gptq_v2" if packing == "auto_round" else "gptq"
        return other, {"bits": bits, "group_size": size, "sym": symmetric, "checkpoint_format": version, "quant_method": "gptq"}
    if other.name == "awq":
        return other, {"bits": bits, "group_size": size, "zero_point": True, "version": "gemm", "quant_method": "awq"}
    if other.name == "fp8":
        return other, {"quant_method": "fp8", "weight_block_size": size if isinstance(size, list) else None}
    return other, _compressed(config)


def _compressed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of compressed-tensors for floats."""
    bits, kind = config["bits"], config.get("data_type") or ""
    of_group = {"mx_fp": ("group", 32), "nv_fp": ("tensor_group", 16)}
    strategy, size = of_group.get(kind, ("channel", None))
    layout = {"mx_fp": f"mxfp{bits}-pack-quantized" if bits == 4 else "mxfp8-quantized", "nv_fp": "nvfp4-pack-quantized"}
    weights = {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy, "group_size": size, "dynamic": False}
    activations = None
    if (config.get("act_bits") or 16) <= 8:
        static = config.get("act_dynamic") is False
        of_tokens = {"channel": "tensor" if static else "token"}.get(strategy, strategy)
        activations = {"num_bits": config["act_bits"], "type": "float", "strategy": of_tokens, "dynamic": not static}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout.get(kind, "float-quantized"),
        "config_groups": {"group_0": group},
    }


FORMAT: Format = AutoRound()
