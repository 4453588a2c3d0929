"""AWQ's format, version gemm (AutoAWQ), which vLLM, SGLang and transformers read. For a module of 4 bits in G groups:
  qweight  I32 [in_features, out_features / 8]  eight output rows a word; slot i, low ones first, has row (0 2 4 6 1 3 5 7)[i]
  qzeros   I32 [G, out_features / 8]            zero points, in the same order
  scales   the model's dtype [G, out_features]
A weight is (code - zero_point) * scale with both in [0, 15]. The format says nothing of how a weight was rounded: what AWQ's search
does to scales lies in the weights themselves and in the norms before them.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import TensorSpec
from qcli.files.foreign_json import FLAG, TEXT, Kind, Required, list_of, one_of, whole
from qcli.formats import Choice, Format, Piece, Stored, Weight
from qcli.formats._columns import Columns, group_size, in_columns, left_alone
from qcli.packing import AWQ_ORDER, to_signed, unpack_words
from qcli.schemes import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

_BITS, _TOGETHER = 4, 8
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    "bits": Required(one_of(_BITS)),
    "group_size": Required(whole(WHOLE_ROW)),
    "zero_point": FLAG,
    "version": one_of("gemm", "GEMM"),
    "modules_to_not_convert": list_of(TEXT),
}


class Awq(Columns):
    """See the module and qcli.formats.Format."""

    name = "awq"
    rows_together = rows_in_words = _TOGETHER
    fields = _CONFIG

    def refuses(self, scheme: Scheme) -> str | None:
        of_groups = scheme.share in ("group", "row") and scheme.scale == "model" and scheme.zero_point
        if of_groups and scheme.codebook is None and scheme.activations is None and scheme.bits == _BITS:
            return None
        return (
            f"{self.name}'s format holds integers of 4 bits with zero points, in groups or rows, not {scheme.name} of {scheme.bits}"
        )

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
        return to_signed(_unpack(tensors["weight"]).t().contiguous(), _BITS)

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        zero_point = to_signed(_unpack(tensors["qzeros"]).t().contiguous(), _BITS)
        return {"scale": tensors["scales"].t().contiguous(), "zero_point": zero_point}

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        scheme = self.chosen(choice)
        if compute_dtype != "float16":
            choice.notes.append("vLLM 0.32 takes AWQ's format in bfloat16 too; older readers may compute in float16 alone")
        return {
            "bits": _BITS,
            "group_size": group_size(scheme),
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left_alone(choice) or None,
            "quant_method": self.name,
        }

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        return in_columns(_BITS, config["group_size"], zero_point=True)


def _unpack(words: "torch.Tensor") -> "torch.Tensor":
    """Words int32 [n, rows / 8] to codes uint8 [n, rows]."""
    inverse = sorted(range(_TOGETHER), key=AWQ_ORDER.__getitem__)
    codes: torch.Tensor = unpack_words(words, _BITS, words.shape[1] * _TOGETHER)
    found: torch.Tensor = codes.unflatten(1, (-1, _TOGETHER))[..., inverse].flatten(1)
    return found


FORMAT: Format = Awq()
