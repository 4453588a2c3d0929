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

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.errors import CheckpointError
from qcli.files.foreign_json import FLAG, OBJECT, TEXT, Kind, Required, check, one_of, whole
from qcli.formats import Choice, Format, Piece, Stored, Weight, _columns
from qcli.formats._plain import Plain
from qcli.formats._selection import fused_notes
from qcli.schemes import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
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


class Gptq(Plain):
    """See the module and qcli.formats.Format."""

    name = "gptq"
    library = "gptqmodel"
    rows_together = 1

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
        return _columns.divisibility(scheme, in_features, out_features, 32)

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        return _columns.mixture_reason(self.name, schemes)

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        return _columns.head_reason(self.name, self.refuses(head), tied)

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        from qcli.packing import words_of

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
        from qcli.packing import pack_words

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
        from qcli.packing import to_signed, unpack_words

        bits = stored.scheme.bits
        return to_signed(unpack_words(tensors["weight"].t().contiguous(), bits, stored.in_features), bits)

    def pairs(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        import torch

        packed = stored.scheme.bits == 4 and stored.in_features % 8 == 0
        return tensors["weight"].t().contiguous().view(torch.uint8) if packed else None

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        import torch

        from qcli.packing import to_signed, unpack_words

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
        scheme = _columns.one_scheme(choice, f"{self.name}'s format")
        choice.notes += fused_notes(choice)
        if scheme and scheme.bits != 4:
            choice.notes.append("vLLM 0.32 reads GPTQ's format of 4 and 8 bits alone, and of 4 alone on a CPU")
        left = _columns.left_alone(choice)
        return {
            "bits": scheme.bits if scheme else 4,
            "group_size": _columns.group_size(scheme) if scheme else WHOLE_ROW,
            "desc_act": False,
            "sym": True,
            "lm_head": False,
            "quant_method": self.name,
            "checkpoint_format": self.name,
            "pack_dtype": "int32",
            # Patterns of what is left alone, as GPTQModel and vLLM read them: "-:" before a regular expression.
            **({"dynamic": {f"-:^{_escaped(module)}$": {} for module in left}} if left != ["lm_head"] else {}),
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
        for pattern, options in (config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and options:
                raise CheckpointError(
                    f"{label}.dynamic has other options for {pattern!r}, which qcli does not read", _columns.LOAD_ELSEWHERE
                )

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        from qcli.formats._reading import read_each

        return read_each(source, linears, lambda source, linear: self._read(config, source, linear))

    def attribute(self, name: str) -> str:
        return "weight" if name == "qweight" else name

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        return sorted(pattern for pattern in config.get("dynamic") or {}) or None

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
                if spec.name.endswith("g_idx") and not config.get("desc_act"):
                    continue
                raise Problem(f"{linear.tensor} lacks {spec.name}")
            expect(source, spec.name, _columns.FLOATS if spec.name.endswith("scales") else (spec.dtype,), spec.shape)
        names = {self.attribute(name): f"{module}{name}" for name in ("qweight", *_columns.COMPANIONS)}
        offset = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
        shape = linear.out_features, linear.in_features
        return Stored(self.name, scheme, *shape, present(source, names), zero_offset=offset)


def _scheme(config: Mapping[str, Any]) -> Scheme:
    bits, size = config["bits"], config["group_size"]
    whole_row = size == WHOLE_ROW
    return Scheme(
        f"w{bits}a16",
        "rtn",
        bits,
        "row" if whole_row else "group",
        0 if whole_row else size,
        zero_point=config.get("sym") is False,
        scale="model",
    )


def _size(stored: Stored) -> int:
    return stored.scheme.size if stored.scheme.share == "group" else stored.in_features


def _escaped(module: str) -> str:
    return module.replace(".", r"\.")


FORMAT: Format = Gptq()
