"""The format of checkpoints that are published in FP8 with a scale for each square block (DeepSeek-V3; transformers'
FineGrainedFP8). It is read, not written. For a weight [out_features, in_features] in blocks of b:
  weight            F8_E4M3 [out_features, in_features]
  weight_scale_inv  F32, BF16, F16 or F8_E8M0 [ceil(out_features / b), ceil(in_features / b)]; it multiplies, whatever its name says
A module whose weight is stored in another dtype is not quantized, even where a scale stands beside it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.files.foreign_json import TEXT, Kind, Required, list_of, one_of, whole
from qcli.formats import Format, Stored, Weight
from qcli.formats._columns import FLOATS
from qcli.formats._plain import ReadOnly
from qcli.schemes import FP8_BLOCK, NAMED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

_SCALE = "weight_scale_inv"
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    "activation_scheme": one_of("dynamic"),
    "weight_block_size": list_of(whole(1), 2),
    "modules_to_not_convert": list_of(TEXT),
}


class BlockFp8(ReadOnly):
    """See the module and qcli.formats.Format."""

    name = "fp8"
    library = "transformers"
    fields = _CONFIG

    def refuses(self, scheme: Scheme) -> str | None:
        return f"{super().refuses(scheme)}; --format compressed-tensors holds fp8 in blocks"

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        shape = weight.out_features, weight.in_features
        scale = TensorSpec(f"{weight.name.removesuffix('weight')}{_SCALE}", "F32", scheme.scale_shape(*shape))
        return [TensorSpec(weight.name, "F8_E4M3", shape), scale]

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        return tensors["weight"]

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        return {"scale": tensors[_SCALE].float()}

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        found = {name: f"{name.removesuffix(_SCALE)}weight" for name in tensors if name.endswith(f".{_SCALE}")}
        return {name: weight for name, weight in found.items() if weight in tensors}

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        if f"{codes.removesuffix('weight')}{_SCALE}" not in tensors or tensors[codes].dtype != "F8_E4M3":
            return None
        sizes = (config or {}).get("weight_block_size")
        size = sizes[0] if isinstance(sizes, list) and sizes and isinstance(sizes[0], int) and sizes[0] > 0 else FP8_BLOCK
        return _scheme(size)

    def read_one(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        from qcli.formats._reading import Problem, expect, present

        scale = f"{linear.tensor.removesuffix('weight')}{_SCALE}"
        if source.tensors[linear.tensor].dtype != "F8_E4M3":
            return None
        if scale not in source.tensors:
            raise Problem(f"{linear.tensor} is float8 and lacks {scale}")
        rows, columns = config.get("weight_block_size") or (FP8_BLOCK, FP8_BLOCK)
        if rows != columns:
            raise Problem(f"{linear.tensor} has blocks of {rows} x {columns}, expected squares")
        scheme = _scheme(rows)
        expect(source, linear.tensor, ("F8_E4M3",), (linear.out_features, linear.in_features))
        expect(source, scale, (*FLOATS, "F8_E8M0"), scheme.scale_shape(linear.out_features, linear.in_features))
        held = present(source, {"weight": linear.tensor, _SCALE: scale})
        return Stored(self.name, scheme, linear.out_features, linear.in_features, held)


def _scheme(size: int) -> Scheme:
    return replace(NAMED["fp8"], share="block", size=size, scale="float32", activations="group")


FORMAT: Format = BlockFp8()
