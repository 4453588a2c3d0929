"""The on-disk format of bitsandbytes, as transformers 4 and 5 read and write it.

4-bit, for a weight P of logical shape [out_features, in_features], flattened row-major:
  P                                    U8  [ceil(n/2), 1]      two codes a byte, the first in the high nibble
  P.absmax                             F32 or U8 [blocks]      U8 codes under double quantization
  P.quant_map                          F32 [16]                the codebook
  P.nested_absmax, P.nested_quant_map  F32 [ceil(blocks/256)], F32 [256]   with double quantization only
  P.quant_state.bitsandbytes__TYPE     U8  [length]            UTF-8 JSON
8-bit: P I8 [out_features, in_features], SCB F32 [out_features] (row absmax), weight_format U8 [] = 0 ("row").
Beside 8 bits, where texts have chosen columns, a file of their own: outlier_columns, outlier_weight (qcli/formats/_outliers.py).

When a checkpoint is read, the headers decide which module is quantized and how. The config only says how to compute. Every stored
field that changes what bytes mean is compared with what qcli's kernels do with them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from qcli.checkpoint import dtypes
from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.files.foreign_json import FLAG, NUMBER, TEXT, Kind, Required, at_least, check, list_of, one_of, parse_object, whole
from qcli.formats import Choice, Format, Piece, Stored, Weight, _outliers
from qcli.formats._plain import Plain
from qcli.formats._quant_state import quant_state
from qcli.formats._selection import fused_notes, skip_list, straddling_notes
from qcli.schemes import NAMED, NESTED_BLOCK_SIZE, PAPER_THRESHOLD, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

_STATE = ".quant_state.bitsandbytes__"
_PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # companions of a weight, after the dot
_HELD_4BIT = ("absmax", "nested_absmax")  # those that a module holds: the tables are the kernels' own
_CODEBOOKS = ("nf4", "fp4")
_ROW_FORMAT = 0  # of weight_format: rows as they are; others interleave them for kernels that are no longer made
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"), FLAG),
    "bnb_4bit_compute_dtype": one_of(*dtypes.MODEL_DTYPES, *(f"torch.{name}" for name in dtypes.MODEL_DTYPES)),
    "bnb_4bit_quant_storage": TEXT,
    "bnb_4bit_quant_type": one_of(*_CODEBOOKS),
    "bnb_4bit_use_double_quant": FLAG,
    "llm_int8_threshold": at_least(0),
    "llm_int8_skip_modules": list_of(TEXT),
    "llm_int8_has_fp16_weight": FLAG,
}
_QUANT_STATE: Mapping[str, Kind | Required] = {
    "quant_type": Required(one_of(*_CODEBOOKS)),
    "blocksize": Required(whole(1, 1 << 20)),
    "dtype": Required(one_of(*dtypes.MODEL_DTYPES)),
    "shape": Required(list_of(whole(1), 2)),
    "nested_blocksize": one_of(NESTED_BLOCK_SIZE),
    "nested_dtype": one_of("float32"),
    "nested_offset": NUMBER,
}


class Bitsandbytes(Plain):
    """See the module and qcli.formats.Format."""

    name = library = "bitsandbytes"
    fields = _CONFIG
    hint = "Mend the file, or fetch it again."
    skip_list = "llm_int8_skip_modules"

    def refuses(self, scheme: Scheme) -> str | None:
        is_4bit = scheme.share == "flat" and scheme.codebook in _CODEBOOKS
        is_8bit = scheme.method == "llm-int8" and not scheme.keeps_original
        return None if is_4bit or is_8bit else f"{self.name} holds nf4, fp4 and llm-int8, not {scheme.name}"

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        several = len({(scheme.bits, scheme.threshold) for scheme in schemes}) > 1
        return f"{self.name} has one number of bits and one threshold for all modules" if several else None

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        if reason := self.refuses(head):
            return reason
        if tied:
            return f"{self.name} has no quantized embedding, and the head is tied to it"
        mixed = any((other.bits, other.threshold) != (head.bits, head.threshold) for other in others)
        return f"{self.name} has one number of bits for all modules" if mixed else None

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The shape of the stored 8-bit codes of a weight."""
        return out_features, in_features

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        name, module = weight.name, weight.name.removesuffix("weight")
        if scheme.bits == 8:
            return [
                TensorSpec(name, "I8", self.codes_shape(weight.out_features, weight.in_features)),
                TensorSpec(f"{module}SCB", "F32", (weight.out_features,)),
                TensorSpec(f"{module}weight_format", "U8", ()),
                *_outliers.tensors(weight, scheme),
            ]
        blocks = scheme.scales(weight.out_features, weight.in_features)
        state = quant_state(weight, scheme, 0.0)
        specs = [
            TensorSpec(name, "U8", (-(-weight.out_features * weight.in_features // 2), 1)),
            TensorSpec(f"{name}.absmax", "U8" if scheme.double_quant else "F32", (blocks,)),
            TensorSpec(f"{name}.quant_map", "F32", (16,)),
            TensorSpec(f"{name}{_STATE}{scheme.codebook}", "U8", (len(state),)),
        ]
        if scheme.double_quant:
            specs.append(TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK_SIZE),)))
            specs.append(TensorSpec(f"{name}.nested_quant_map", "F32", (256,)))
        return specs

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        import torch

        from qcli.codebooks import CODEBOOKS, DYNAMIC_MAP

        name, module = weight.name, weight.name.removesuffix("weight")
        if "codes" in parts:
            yield Piece(name, start * scheme.bits // 8, parts["codes"])
        if "scale" not in parts:
            return
        if scheme.bits == 8:
            yield Piece(f"{module}SCB", 0, parts["scale"])
            yield Piece(f"{module}weight_format", 0, torch.tensor(_ROW_FORMAT, dtype=torch.uint8))
            yield from (Piece(f"{module}{role}", 0, parts[role]) for role in _outliers.ROLES if role in parts)
            return
        offset = float(parts["nested_offset"]) if scheme.double_quant else None
        state = bytearray(quant_state(weight, scheme, offset))
        yield Piece(f"{name}.absmax", 0, parts["scale"])
        yield Piece(f"{name}.quant_map", 0, torch.from_numpy(CODEBOOKS[scheme.codebook or ""].copy()))
        yield Piece(f"{name}{_STATE}{scheme.codebook}", 0, torch.frombuffer(state, dtype=torch.uint8))
        if scheme.double_quant:
            yield Piece(f"{name}.nested_absmax", 0, parts["nested_scale"])
            yield Piece(f"{name}.nested_quant_map", 0, torch.from_numpy(DYNAMIC_MAP.copy()))

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        import torch

        codes = tensors["weight"]
        return codes.view(stored.out_features, stored.in_features) if stored.scheme.bits == 8 else codes.view(torch.uint8)

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        import torch

        parts = {"scale": tensors["SCB" if stored.scheme.bits == 8 else "weight_absmax"].view(-1)}
        if stored.nested_offset is not None:
            parts["nested_scale"] = tensors["weight_nested_absmax"].view(-1)
            parts["nested_offset"] = torch.tensor(stored.nested_offset, dtype=torch.float64)
        return parts | {role: tensors[role] for role in _outliers.ROLES if role in tensors}

    def file_apart(self, tensor: str) -> str | None:
        return _outliers.FILE if tensor.endswith(_outliers.ROLES) else None

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        """With the fields that transformers writes. For 8 bits the 4-bit fields hold transformers' defaults."""
        schemes = list(dict.fromkeys(choice.schemes.values()))
        first = schemes[0] if schemes else NAMED["nf4"]
        for other in schemes[1:]:
            if other.bits != first.bits or other.threshold != first.threshold:
                choice.problems.append(
                    f"bitsandbytes' format has one number of bits and one threshold for all modules, and the recipe asks for "
                    f"{first.name} and {other.name}"
                )
        skip = skip_list(choice)
        choice.notes += fused_notes(choice)
        choice.notes += straddling_notes(choice)
        is_4bit = first.bits == 4
        return {
            "_load_in_4bit": is_4bit,
            "_load_in_8bit": not is_4bit,
            "bnb_4bit_compute_dtype": compute_dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": first.codebook or "fp4",
            "bnb_4bit_use_double_quant": first.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": skip,
            # A JSON float: transformers refuses an integer.
            "llm_int8_threshold": PAPER_THRESHOLD if is_4bit else float(first.threshold),
            "load_in_4bit": is_4bit,
            "load_in_8bit": not is_4bit,
            "quant_method": self.name,
        }

    def owns(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("quant_method", self.name) == self.name)

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        owners = {}
        for name in tensors:
            weight = name.partition(".weight.")[0] + ".weight"
            if ".weight." in name and weight in tensors:
                owners[name] = weight
            base, _, last = name.rpartition(".")
            if last in ("SCB", "weight_format", *_outliers.ROLES) and f"{base}.weight" in tensors:
                owners[name] = f"{base}.weight"
        return owners

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        if f"{(base := codes.removesuffix('weight'))}SCB" in tensors:
            return replace(NAMED["llm-int8"], outlier_share=_outliers.share(base, tensors))
        for codebook in _CODEBOOKS:
            if f"{codes}{_STATE}{codebook}" in tensors:
                return NAMED[codebook if f"{codes}.nested_absmax" in tensors else f"{codebook}-plain"]
        return None

    def in_memory(self, spec: "TensorSpec | TensorInfo") -> bool:
        return _STATE not in spec.name and not spec.name.endswith("weight_format")

    def in_module(self, spec: "TensorSpec | TensorInfo") -> bool:
        return self.in_memory(spec) and not spec.name.endswith("quant_map")

    def attribute(self, name: str) -> str:
        return name.replace("weight.", "weight_", 1)

    def renamings(self) -> list[tuple[str, str]]:
        return [(f"weight.{part}$", f"weight_{part}") for part in _HELD_4BIT]

    def read_one(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        if f"{linear.tensor.removesuffix('weight')}SCB" in source.tensors:
            return _read_8bit(config, source, linear, self.codes_shape(linear.out_features, linear.in_features))
        codebook = next((each for each in _CODEBOOKS if f"{linear.tensor}{_STATE}{each}" in source.tensors), None)
        return None if codebook is None else _read_4bit(config, source, linear, codebook)


def _read_8bit(config: Mapping[str, Any], source: "Source", linear: Linear, shape: tuple[int, int]) -> Stored:
    from qcli.formats._reading import Problem, expect, present, read_bytes

    base = linear.tensor.removesuffix("weight")
    names = {"weight": linear.tensor, "SCB": f"{base}SCB"}
    expect(source, linear.tensor, ("I8",), shape)
    expect(source, names["SCB"], ("F32",), (linear.out_features,))
    if (row_format := f"{base}weight_format") in source.tensors:
        data = read_bytes(source, row_format)
        if any(data) or len(data) > 8:
            raise Problem(f"{row_format} is {list(data[:8])}, and only {_ROW_FORMAT}, plain rows, is read")
    threshold = config.get("llm_int8_threshold")
    names |= _outliers.read(source, linear)
    scheme = replace(
        NAMED["llm-int8"],
        threshold=PAPER_THRESHOLD if threshold is None else float(threshold),
        outlier_share=_outliers.share(base, source.tensors),
    )
    return Stored(Bitsandbytes.name, scheme, linear.out_features, linear.in_features, present(source, names))


def _read_4bit(config: Mapping[str, Any], source: "Source", linear: Linear, codebook: str) -> Stored:
    from qcli.formats._reading import Problem, made_again, present, read_bytes

    tensor, state_name = linear.tensor, f"{linear.tensor}{_STATE}{codebook}"
    label = f"{source.label}: {state_name}"
    state = parse_object(read_bytes(source, state_name), label, made_again(source))
    check(state, _QUANT_STATE, label, made_again(source))
    nested = state.get("nested_offset") is not None
    lacking = [f"{tensor}.{p}" for p in (_PARTS_4BIT if nested else _PARTS_4BIT[:2]) if f"{tensor}.{p}" not in source.tensors]
    if lacking:
        raise Problem(f"{tensor} lacks {', '.join(lacking)}")
    if state["quant_type"] != codebook:
        raise Problem(f"{state_name} says quant_type {state['quant_type']}")
    expected = [linear.out_features, linear.in_features]
    if state["shape"] != expected:
        raise Problem(f"{state_name} says shape {state['shape']}, the model expects {expected}")
    if not nested and f"{tensor}.nested_absmax" in source.tensors:
        raise Problem(f"{state_name} has no nested_offset, and {tensor}.nested_absmax is there")
    scheme = replace(NAMED[codebook if nested else f"{codebook}-plain"], size=state["blocksize"])
    _check_4bit(source, tensor, scheme, prod(expected))
    names = {"weight": tensor, **{f"weight_{p}": f"{tensor}.{p}" for p in _HELD_4BIT}}
    compute = str(config.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    shape, offset = (linear.out_features, linear.in_features), state.get("nested_offset")
    return Stored(Bitsandbytes.name, scheme, *shape, present(source, names), offset, compute)


def _check_4bit(source: "Source", tensor: str, scheme: Scheme, count: int) -> None:
    """Sizes, and the tables: kernels decode by their own, so the stored ones must be the same."""
    import numpy as np

    from qcli.codebooks import CODEBOOKS, DYNAMIC_MAP
    from qcli.formats._reading import Problem, expect, read_bytes

    info = source.tensors[tensor]
    # bnb_4bit_quant_storage may call the bytes another dtype, so that they can be sharded beside 16-bit weights.
    if info.nbytes != -(-count // 2) or info.dtype not in ("U8", "I8", *dtypes.FLOATS):
        raise Problem(f"{tensor} holds {info.nbytes:,} bytes of {info.dtype}, expected {-(-count // 2):,} for {count:,} codes")
    blocks = -(-count // scheme.size)
    tables = {f"{tensor}.quant_map": (CODEBOOKS[scheme.codebook or ""], scheme.codebook)}
    expect(source, f"{tensor}.absmax", ("U8",) if scheme.double_quant else ("F32",), (blocks,))
    if scheme.double_quant:
        expect(source, f"{tensor}.nested_absmax", ("F32",), (-(-blocks // NESTED_BLOCK_SIZE),))
        tables[f"{tensor}.nested_quant_map"] = (DYNAMIC_MAP, "double quantization")
    for name, (table, what) in tables.items():
        expect(source, name, ("F32",), table.shape)
        stored = np.frombuffer(read_bytes(source, name), dtype="<f4")
        if not np.allclose(stored, table, rtol=1e-4, atol=1e-7):  # to the rounding of whoever wrote it
            raise Problem(f"{name} is not the table of {what}, by which qcli decodes")


FORMAT: Format = Bitsandbytes()
