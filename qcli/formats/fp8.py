"""The format of checkpoints that are published in FP8 with a scale for each square block (DeepSeek-V3; transformers'
FineGrainedFP8). It is read, not written. For a weight [out_features, in_features] in blocks of b:
  weight            F8_E4M3 [out_features, in_features]
  weight_scale_inv  F32, BF16, F16 or F8_E8M0 [ceil(out_features / b), ceil(in_features / b)]; it multiplies, whatever its name says
A module whose weight is stored in another dtype is not quantized, even where a scale stands beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.files.foreign_json import TEXT, Kind, Required, check, list_of, one_of, whole
from qcli.formats import Choice, Format, Piece, Stored, Weight, _columns
from qcli.formats._plain import Plain
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


class BlockFp8(Plain):
    """See the module and qcli.formats.Format."""

    name = "fp8"
    library = "transformers"
    rows_together = 1

    def refuses(self, scheme: Scheme) -> str | None:
        return f"{self.name}'s format is read, not written; --format compressed-tensors holds fp8 in blocks"

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        return None

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        return self.refuses(head)

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        shape = weight.out_features, weight.in_features
        scale = TensorSpec(f"{weight.name.removesuffix('weight')}{_SCALE}", "F32", scheme.scale_shape(*shape))
        return [TensorSpec(weight.name, "F8_E4M3", shape), scale]

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        raise NotImplementedError

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        return tensors["weight"]

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        return {"scale": tensors[_SCALE].float()}

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        raise NotImplementedError

    def owns(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.name

    def weight_name(self, tensor: str) -> str:
        return tensor

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        found = {name: f"{name.removesuffix(_SCALE)}weight" for name in tensors if name.endswith(f".{_SCALE}")}
        return {name: weight for name, weight in found.items() if weight in tensors}

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        if f"{codes.removesuffix('weight')}{_SCALE}" not in tensors or tensors[codes].dtype != "F8_E4M3":
            return None
        sizes = (config or {}).get("weight_block_size")
        size = sizes[0] if isinstance(sizes, list) and sizes and isinstance(sizes[0], int) and sizes[0] > 0 else FP8_BLOCK
        return _scheme(size)

    def parameters_in(self, info: "TensorInfo", scheme: Scheme, config: Mapping[str, Any] | None) -> int:
        return info.numel

    def in_memory(self, spec: "TensorSpec | TensorInfo") -> bool:
        return True

    def in_module(self, spec: "TensorSpec | TensorInfo") -> bool:
        return True

    def check(self, config: Mapping[str, Any], label: str) -> None:
        check(config, _CONFIG, label, _columns.LOAD_ELSEWHERE)

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        from qcli.formats._reading import read_each

        return read_each(source, linears, lambda source, linear: self._read(config, source, linear))

    def attribute(self, name: str) -> str:
        return name

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        found: list[str] | None = config.get("modules_to_not_convert")
        return found

    def renamings(self) -> list[tuple[str, str]]:
        return []

    def _read(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
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
        expect(source, scale, (*_columns.FLOATS, "F8_E8M0"), scheme.scale_shape(linear.out_features, linear.in_features))
        held = present(source, {"weight": linear.tensor, _SCALE: scale})
        return Stored(self.name, scheme, linear.out_features, linear.in_features, held)


def _scheme(size: int) -> Scheme:
    return replace(NAMED["fp8"], share="block", size=size, scale="float32", activations="group")


FORMAT: Format = BlockFp8()
