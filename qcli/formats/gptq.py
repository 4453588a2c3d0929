"""GPTQ's format (AutoGPTQ, GPTQModel), which vLLM, SGLang and transformers read. For a module of b bits in G groups:
  qweight  I32 [ceil(in_features b / 32), out_features]  unsigned codes in a stream of bits down each column, low ones first
  qzeros   I32 [G, ceil(out_features b / 32)]            zero points likewise along the rows, less 1
  scales   the model's dtype [G, out_features]
  g_idx    I32 [in_features]                             the group of each input column
A weight is (code - zero_point) * scale, where the zero point of a symmetric weight is 2^(b-1). This is version 1, in which zero
points are stored less 1. Readers disagree about one of 0: some wrap a field, GPTQModel borrows from the next one. So symmetric
weights alone are written. Others are read as GPTQModel writes them; version 2 (`checkpoint_format: "gptq_v2"`) stores zero points
as they are.

Files of others may have columns in another order (desc_act): g_idx then names any group. Some have no g_idx, and none of another
order.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.errors import CheckpointError
from qcli.files.foreign_json import FLAG, OBJECT, TEXT, Kind, Required, one_of, whole
from qcli.formats import Choice, Format, Piece, Stored, Weight
from qcli.formats._columns import Columns, group_size, in_columns, left_alone
from qcli.packing import pack_words, to_signed, unpack_words, words_of
from qcli.schemes import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.source import Source

_BITS = (2, 3, 4, 8)
_VERSIONS = ("gptq", "gptq_v2")
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    "bits": Required(one_of(*_BITS)),
    "group_size": Required(whole(WHOLE_ROW)),
    "desc_act": FLAG,
    "sym": FLAG,
    "checkpoint_format": one_of(*_VERSIONS),
    "pack_dtype": one_of("int32"),
    "dynamic": OBJECT,
}


class Gptq(Columns):
    """See the module and qcli.formats.Format."""

    name = "gptq"
    rows_in_words = 32
    fields = _CONFIG

    def refuses(self, scheme: Scheme) -> str | None:
        in_rows = scheme.share in ("group", "row") and scheme.scale == "model"
        integers = scheme.codebook is None and scheme.activations is None and scheme.bits in _BITS
        if in_rows and integers and not scheme.zero_point:
            return None
        what = f"{scheme.name} with zero points" if in_rows and integers else scheme.name
        return f"{self.name}'s format holds symmetric integers of 2, 3, 4 or 8 bits in groups or rows, not {what}"

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        if in_features % 32:
            return f"rows of {in_features} are no multiple of 32, of which readers of {self.name} make words"
        return super().refuses_shape(scheme, out_features, in_features)

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        module, rows, columns = weight.name.removesuffix("weight"), weight.out_features, weight.in_features
        count = scheme.scale_shape(rows, columns)[1]
        return [
            TensorSpec(f"{module}qweight", "I32", (words_of(columns, scheme.bits), rows)),
            TensorSpec(f"{module}qzeros", "I32", (count, words_of(rows, scheme.bits))),
            TensorSpec(f"{module}scales", weight.dtype, (count, rows)),
            TensorSpec(f"{module}g_idx", "I32", (columns,)),
        ]

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        import torch

        from qcli.ops.pack_codes import pack_codes

        module, rows, columns = weight.name.removesuffix("weight"), weight.out_features, weight.in_features
        if "codes" in parts:
            words = pack_codes(parts["codes"], scheme.bits, "columns")
            yield Piece(f"{module}qweight", start // columns * 4, words, rows * 4)
        if "scale" not in parts:
            return
        scale = parts["scale"].view(rows, -1)
        less_one = torch.full(scale.shape[::-1], (1 << (scheme.bits - 1)) - 1, dtype=torch.uint8)
        size = scheme.size if scheme.share == "group" else columns
        yield Piece(f"{module}qzeros", 0, pack_words(less_one, scheme.bits))
        yield Piece(f"{module}scales", 0, scale.t().contiguous())
        yield Piece(f"{module}g_idx", 0, torch.arange(columns, dtype=torch.int32) // size)

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        bits = stored.scheme.bits
        return to_signed(unpack_words(tensors["weight"].t().contiguous(), bits, stored.in_features), bits)

    def pairs(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        import torch

        packed = stored.scheme.bits == 4 and stored.in_features % 8 == 0
        return tensors["weight"].t().contiguous().view(torch.uint8) if packed else None

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        import torch

        bits, parts = stored.scheme.bits, {"scale": tensors["scales"].t().contiguous()}
        if stored.scheme.zero_point:
            words = tensors["qzeros"]
            if stored.zero_offset and 32 % bits == 0:  # with carries from field to field, as GPTQModel has borrowed
                ones = sum(1 << shift for shift in range(0, 32, bits))
                words = (words.long() + stored.zero_offset * ones).to(torch.int32)
            zero_point = unpack_words(words, bits, stored.out_features)
            if stored.zero_offset and 32 % bits:
                zero_point = (zero_point + stored.zero_offset) & ((1 << bits) - 1)
            parts["zero_point"] = to_signed(zero_point, bits).t().contiguous()
        order = tensors.get("g_idx")
        if order is not None and not torch.equal(order, torch.arange(len(order), device=order.device) // _size(stored)):
            parts["group_of_column"] = order
        return parts

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        scheme = self.chosen(choice)
        if scheme and scheme.bits != 4:
            choice.notes.append("vLLM 0.32 reads GPTQ's format of 4 and 8 bits alone, and of 4 alone on a CPU")
        left = left_alone(choice)
        return {
            "bits": scheme.bits if scheme else 4,
            "group_size": group_size(scheme),
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "quant_method": self.name,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            # Patterns of what is left alone, as GPTQModel and vLLM read them: "-:" before a regular expression.
            **({"dynamic": {f"-:^{_escaped(module)}$": {} for module in left}} if left != ["lm_head"] else {}),
        }

    def check(self, config: Mapping[str, Any], label: str) -> None:
        super().check(config, label)
        for pattern, options in (config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and options:
                raise CheckpointError(f"{label}.dynamic has other options for {pattern!r}, which qcli does not read", self.hint)

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        return sorted(pattern for pattern in config.get("dynamic") or {}) or None

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        return in_columns(config["bits"], config["group_size"], zero_point=config.get("sym") is False)

    def read_one(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        found = super().read_one(config, source, linear)
        return found and replace(found, zero_offset=0 if config.get("checkpoint_format") == "gptq_v2" else 1)


def _size(stored: Stored) -> int:
    return stored.scheme.size if stored.scheme.share == "group" else stored.in_features


def _escaped(module: str) -> str:
    return module.replace(".", r"\.")


FORMAT: Format = Gptq()
