"""qcli's own format: every scheme that is quantized, and any mixture of them in one model. qcli alone reads it.

NF4, FP4 and LLM.int8() have the tensors of bitsandbytes' format. Any other weight P, [out_features, in_features], has:
  P               U8 [out_features * B, 1]: codes of 2 to 4 bits in planes of 64 columns (qcli/packing.py), B bytes a row; unsigned,
                  an integer of b bits as code + 2^(b-1)
                  I8 or F8_E4M3 [out_features * in_features, 1]: codes of 8 bits
  P.scale         as the scheme says: F32, the model's dtype, U8 (exponent + 127) or F8_E4M3; rows and columns as it shares them
  P.zero_point    I8 or I32, of the shape of P.scale
  P.global_scale  F32 [1], what F8_E4M3 scales are divided by
  P.table         F16 or F32 [out_features, 2^b], what the codes of a row name, in the place of scales
  P.sparse_values, P.sparse_columns
                  the model's dtype and I32 [out_features, count]: elements of each row that stand in the place of what their codes
                  name; columns ascend
config.json lists the schemes, and the weights of each with their shapes. What it does not list is of bitsandbytes' kind.

Without qcli, which registers the format with it, transformers would skip what the config says and take codes for weights. So all
codes lie in one column, and transformers stops at their shape.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcli.checkpoint import dtypes
from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.errors import CheckpointError
from qcli.formats import Choice, Format, Piece, Stored, Weight
from qcli.formats import _schemes_config as listed
from qcli.formats.bitsandbytes import Bitsandbytes
from qcli.packing import plane_bytes, to_signed, unpack_planes
from qcli.schemes import PAPER_THRESHOLD, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

_PARTS = (
    "scale",
    "zero_point",
    "global_scale",
    "table",
    "sparse_values",
    "sparse_columns",
)  # companions of a weight, after the dot
_MODEL_DTYPES = tuple(dtypes.CODES[name] for name in dtypes.MODEL_DTYPES)


class Qcli(Bitsandbytes):
    """See the module and qcli.formats.Format. 8-bit codes of bitsandbytes' kind: P I8 [out_features * in_features, 1]."""

    name = library = "qcli"

    def refuses(self, scheme: Scheme) -> str | None:
        if scheme.keeps_original:
            return f"{self.name} holds no columns in 16 bits that texts alone show, so not {scheme.name}"
        return None if scheme.bits else f"{self.name} holds what is quantized, not {scheme.name}"

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        return None

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        return self.refuses(head)

    def layout_of(self, scheme: Scheme) -> str:
        return Bitsandbytes.name if _is_older(scheme) else self.name

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features * in_features, 1

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        if _is_older(scheme):
            return super().tensors(weight, scheme)
        rows, columns = weight.out_features, weight.in_features
        parts = scheme.parts(rows, columns, weight.dtype)
        specs = [TensorSpec(weight.name, _codes_dtype(scheme), (rows * _row_bytes(scheme, columns), 1))]
        for role, part in parts.items():
            if role != "codes":
                shape = scheme.scale_shape(rows, columns) if role in ("scale", "zero_point") else part.shape
                specs.append(TensorSpec(f"{weight.name}.{role}", part.dtype, shape))
        return specs

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        if _is_older(scheme):
            yield from super().pack(weight, scheme, parts, start)
            return
        import torch

        from qcli.ops.pack_codes import pack_codes

        columns = weight.in_features
        for role, part in parts.items():
            if role != "codes":
                if role == "scale" and scheme.scale == "float32" and not scheme.zero_point:
                    part = part * (1 / 127)  # an encoder of int8 gives the absmax
                yield Piece(f"{weight.name}.{role}", 0, part.to(torch.int32) if part.dtype == torch.int64 else part)
            elif scheme.bits == 8:
                yield Piece(weight.name, start, part)
            else:
                codes = pack_codes(part.view(-1, columns), scheme.bits, "planes")  # those of a codebook are unsigned
                yield Piece(weight.name, start // columns * _row_bytes(scheme, columns), codes)

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        codes, scheme = tensors["weight"], stored.scheme
        if scheme.bits == 8:
            return codes.view(stored.out_features, stored.in_features)
        found = unpack_planes(codes.view(stored.out_features, -1), scheme.bits, stored.in_features)
        return found if scheme.codebook else to_signed(found, scheme.bits)

    def planes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        return tensors["weight"].view(stored.out_features, -1) if stored.scheme.bits < 8 else None

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        return {part: tensors[f"weight_{part}"] for part in _PARTS if tensors.get(f"weight_{part}") is not None}

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        thresholds = sorted({scheme.threshold for scheme in choice.schemes.values() if scheme.method == "llm-int8"})
        common = thresholds[0] if thresholds else PAPER_THRESHOLD
        head = [choice.layout.head.linear] if choice.layout.head else []
        linears = {linear.module: linear for linear in (*choice.layout.linears.values(), *head)}
        weights: dict[Scheme, dict[str, tuple[int, int]]] = {}
        for module, scheme in choice.schemes.items():
            if not _is_older(scheme) or (scheme.threshold != common and scheme.bits == 8):
                linear = linears[module]
                weights.setdefault(scheme, {})[linear.tensor] = (linear.out_features, linear.in_features)
        return {
            "bnb_4bit_compute_dtype": compute_dtype,
            "llm_int8_threshold": float(common),
            "quant_method": self.name,
            **({"schemes": [listed.described(*entry) for entry in weights.items()]} if weights else {}),
        }

    def owns(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("quant_method") == self.name)

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        entry = listed.entry_of(codes, config) if config and self.owns(config) else None
        if entry is None:
            return super().scheme_of(codes, tensors, config)
        try:
            listed.check_entry(entry, self.name)
        except CheckpointError:
            return None
        return listed.scheme_in(entry)

    def parameters_in(self, info: "TensorInfo", scheme: Scheme, config: Mapping[str, Any] | None) -> int:
        shape = listed.shape_of(info.name, config)
        return shape[0] * shape[1] if shape else super().parameters_in(info, scheme, config)

    def check(self, config: Mapping[str, Any], label: str) -> None:
        super().check(config, label)
        entries = config.get("schemes")
        if entries is not None and not isinstance(entries, list):
            raise CheckpointError(f"{label}.schemes is no list", "Mend the file, or quantize the model again.")
        listed.check_all(entries or (), f"{label}.schemes")

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        from qcli.formats._reading import made_again

        found = super().read(source, linears, config)
        known = {linear.tensor for linear in linears}
        for entry in config.get("schemes") or ():
            if strays := sorted(entry["weights"].keys() - known):
                raise CheckpointError(
                    f"{source.label}: the config lists {strays[0]}, which is no weight of a linear module here", made_again(source)
                )
        return found

    def config_of(self, config: Mapping[str, Any], tensor: str) -> Mapping[str, Any]:
        entries = [entry for entry in config.get("schemes") or () if tensor in entry["weights"]]
        alone = [entry | {"weights": {tensor: entry["weights"][tensor]}} for entry in entries]
        return {**config, "schemes": alone} if "schemes" in config else config

    def renamings(self) -> list[tuple[str, str]]:
        return [*super().renamings(), *((f"weight.{part}$", f"weight_{part}") for part in _PARTS)]

    def read_one(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        from qcli.formats._reading import Problem, expect, present

        name, entry = linear.tensor, listed.entry_of(linear.tensor, config)
        beside = [f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in source.tensors]
        if entry is None:
            if beside:
                raise Problem(f"{beside[0]} is stored, and the config lists no scheme for {name}")
            return super().read_one(config, source, linear)
        scheme, shape = listed.scheme_in(entry), (linear.out_features, linear.in_features)
        if entry["weights"][name] != list(shape):
            raise Problem(f"the config says that {name} is {entry['weights'][name]}, the model expects {list(shape)}")
        if _is_older(scheme):
            found = super().read_one(config, source, linear)
            if found is None:
                raise Problem(f"{name} lacks {name.removesuffix('weight')}SCB")
            return replace(found, scheme=scheme)
        specs = self.tensors(Weight(name, *shape, "BF16"), scheme)
        for spec in specs:
            if spec.name not in source.tensors:
                raise Problem(f"{name} lacks {spec.name}")
            expect(source, spec.name, _MODEL_DTYPES if spec.dtype == "BF16" else (spec.dtype,), spec.shape)
        if strays := set(beside) - {spec.name for spec in specs}:
            raise Problem(f"{min(strays)} is stored, and {scheme.name} has none by the config")
        if f"{name}.sparse_columns" in source.tensors:
            _check_columns(source, f"{name}.sparse_columns", linear)
        names = {self.attribute(spec.name.removeprefix(name.removesuffix("weight"))): spec.name for spec in specs}
        compute = str(config.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        return Stored(self.name, scheme, *shape, present(source, names), compute_dtype=compute)


def _check_columns(source: "Source", name: str, linear: Linear) -> None:
    """Raises Problem unless the columns of each row ascend and are columns."""
    import numpy as np

    from qcli.formats._reading import Problem, read_bytes

    columns = np.frombuffer(read_bytes(source, name), dtype="<i4").reshape(linear.out_features, -1)
    if columns.min() < 0 or columns.max() >= linear.in_features:
        raise Problem(f"{name} has columns from {columns.min():,} to {columns.max():,}, expected 0 to {linear.in_features - 1:,}")
    if (falling := (np.diff(columns) <= 0).any(1)).any():
        raise Problem(f"{name}: the columns of row {int(falling.argmax()):,} do not ascend")


def _is_older(scheme: Scheme) -> bool:
    """Whether the tensors of `scheme` are those of bitsandbytes."""
    return scheme.share == "flat" or scheme.method == "llm-int8"


def _codes_dtype(scheme: Scheme) -> str:
    return "U8" if scheme.bits < 8 else "F8_E4M3" if scheme.codebook else "I8"


def _row_bytes(scheme: Scheme, columns: int) -> int:
    return columns if scheme.bits == 8 else plane_bytes(columns, scheme.bits)


FORMAT: Format = Qcli()
