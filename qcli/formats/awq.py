"""AWQ's format, version gemm (AutoAWQ), which vLLM, SGLang and transformers read. For a module of 4 bits in G groups:
  qweight  I32 [in_features, out_features / 8]  eight output rows a word; slot i, low ones first, has row (0 2 4 6 1 3 5 7)[i]
  qzeros   I32 [G, out_features / 8]            zero points, in the same order
  scales   the model's dtype [G, out_features]
A weight is (code - zero_point) * scale with both in [0, 15]. The format says nothing of how a weight was rounded: what AWQ's search
does to scales lies in the weights themselves and in the norms before them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.errors import CheckpointError
from qcli.files.foreign_json import FLAG, TEXT, Kind, Required, check, list_of, one_of, whole
from qcli.formats import Choice, Format, Piece, Stored, Weight, _columns
from qcli.formats._plain import Plain
from qcli.formats._selection import fused_notes
from qcli.schemes import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

_BITS, _TOGETHER = 4, 8
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    "bits": Required(one_of(_BITS)),
    "group_size": Required(whole(WHOLE_ROW)),
    "zero_point": FLAG,
    "version": one_of("gemm", "GEMM"),
    "modules_to_not_convert": list_of(TEXT),
}


class Awq(Plain):
    """See the module and qcli.formats.Format."""

    name = "awq"
    library = "gptqmodel"
    rows_together = _TOGETHER

    def refuses(self, scheme: Scheme) -> str | None:
        of_groups = scheme.share in ("group", "row") and scheme.scale == "model" and scheme.zero_point
        if of_groups and scheme.codebook is None and scheme.activations is None and scheme.bits == _BITS:
            return None
        return (
            f"{self.name}'s format holds integers of 4 bits with zero points, in groups or rows, not {scheme.name} of {scheme.bits}"
        )

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        return _columns.divisibility(scheme, in_features, out_features, _TOGETHER)

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        return _columns.mixture_reason(self.name, schemes)

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        return _columns.head_reason(self.name, self.refuses(head), tied)

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        module, rows, columns = weight.name.removesuffix("weight"), weight.out_features, weight.in_features
        count = scheme.scale_shape(rows, columns)[1]
        return [
            TensorSpec(f"{module}qweight", "I32", (columns, rows // _TOGETHER)),
            TensorSpec(f"{module}qzeros", "I32", (count, rows // _TOGETHER)),
            TensorSpec(f"{module}scales", weight.dtype, (count, rows)),
        ]

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        from qcli.ops.pack_codes import pack_codes

        module, rows, columns = weight.name.removesuffix("weight"), weight.out_features, weight.in_features
        if "codes" in parts:
            words = pack_codes(parts["codes"], _BITS, "awq")
            yield Piece(f"{module}qweight", start // columns // _TOGETHER * 4, words, rows // _TOGETHER * 4)
        if "scale" not in parts:
            return
        yield Piece(f"{module}qzeros", 0, pack_codes(parts["zero_point"].view(rows, -1), _BITS, "awq"))
        yield Piece(f"{module}scales", 0, parts["scale"].view(rows, -1).t().contiguous())

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        from qcli.packing import to_signed

        return to_signed(_unpack(tensors["weight"]).t().contiguous(), _BITS)

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        from qcli.packing import to_signed

        zero_point = to_signed(_unpack(tensors["qzeros"]).t().contiguous(), _BITS)
        return {"scale": tensors["scales"].t().contiguous(), "zero_point": zero_point}

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        scheme = _columns.one_scheme(choice, f"{self.name}'s format")
        choice.notes += fused_notes(choice)
        if compute_dtype != "float16":
            choice.notes.append("vLLM 0.32 takes AWQ's format in bfloat16 too; older readers may compute in float16 alone")
        left = _columns.left_alone(choice)
        return {
            "bits": _BITS,
            "group_size": _columns.group_size(scheme) if scheme else WHOLE_ROW,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left or None,
            "quant_method": self.name,
        }

    def owns(self, config: Mapping[str, Any]) -> bool:
        return config.get("quant_method") == self.name

    def weight_name(self, tensor: str) -> str:
        return _columns.weight_name(tensor)

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        return _columns.companions(tensors)

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        if not codes.endswith(".qweight") or not self.owns(config or {}):
            return None
        try:
            self.check(config or {}, self.name)
        except CheckpointError:
            return None
        return _scheme(config or {})

    def parameters_in(self, info: "TensorInfo", scheme: Scheme, config: Mapping[str, Any] | None) -> int:
        return info.nbytes * 8 // scheme.bits

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
        return "weight" if name == "qweight" else name

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        found: list[str] | None = config.get("modules_to_not_convert")
        return found

    def renamings(self) -> list[tuple[str, str]]:
        return [("qweight$", "weight")]

    def _read(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        from qcli.formats._reading import Problem, expect, present

        if not linear.tensor.endswith(".qweight"):
            return None
        module, scheme = linear.tensor.removesuffix("qweight"), _scheme(config)
        weight = Weight(f"{module}weight", linear.out_features, linear.in_features, "F16")
        for spec in self.tensors(weight, scheme):
            if spec.name not in source.tensors:
                raise Problem(f"{linear.tensor} lacks {spec.name}")
            expect(source, spec.name, _columns.FLOATS if spec.name.endswith("scales") else (spec.dtype,), spec.shape)
        names = {self.attribute(name): f"{module}{name}" for name in ("qweight", "qzeros", "scales")}
        return Stored(self.name, scheme, linear.out_features, linear.in_features, present(source, names))


def _scheme(config: Mapping[str, Any]) -> Scheme:
    whole_row = config["group_size"] == WHOLE_ROW
    size = 0 if whole_row else config["group_size"]
    return Scheme("w4a16", "rtn", _BITS, "row" if whole_row else "group", size, zero_point=True, scale="model")


def _unpack(words: "torch.Tensor") -> "torch.Tensor":
    """Words int32 [n, rows / 8] to codes uint8 [n, rows]."""
    from qcli.packing import AWQ_ORDER, unpack_words

    inverse = sorted(range(_TOGETHER), key=AWQ_ORDER.__getitem__)
    codes: torch.Tensor = unpack_words(words, _BITS, words.shape[1] * _TOGETHER)
    found: torch.Tensor = codes.unflatten(1, (-1, _TOGETHER))[..., inverse].flatten(1)
    return found


FORMAT: Format = Awq()
