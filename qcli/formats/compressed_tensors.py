"""The format of compressed-tensors, which vLLM and transformers read: a layout for each kind of scheme.

For a weight [out_features, in_features] of b bits, beside the module's other tensors, by layout:
  pack-quantized        weight_packed I32 [out_features, ceil(in_features b / 32)]: code + 2^(b-1) in a stream of bits, low ones
  first
                        weight_scale of the model's dtype, rows and columns as the scheme shares it; weight_shape I64 [2]
                        weight_zero_point I32 [ceil(out_features b / 32), columns], packed likewise along the rows; not if symmetric
  int-quantized         weight I8 [out_features, in_features], weight_scale; activations are rounded
  float-quantized       weight F8_E4M3 likewise
  nvfp4-pack-quantized  weight_packed U8 [out_features, in_features / 2], two codes of E2M1 a byte, the first in the low bits
                        weight_scale F8_E4M3 [out_features, in_features / 16], weight_global_scale F32 [1]
  mxfp4-pack-quantized  the same codes; weight_scale U8 [out_features, in_features / 32]: exponent + 127
config.json names the schemes in groups of modules, and what is left alone. Groups may differ in all of it.

What others write is read besides: columns in the order of weight_g_idx, mxfp8-quantized, naive-quantized (codes of any bits as
int8), stored scales of activations.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import CODES, MODEL_DTYPES, TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.errors import CheckpointError
from qcli.files.foreign_json import OBJECT, TEXT, Kind, Required, list_of, map_of, one_of
from qcli.formats import Choice, Format, Piece, Stored, Weight
from qcli.formats import _ct_config as groups
from qcli.formats._plain import Plain
from qcli.formats._selection import conv1d_problems, fused_notes, ragged_groups
from qcli.packing import pack_pairs, pack_words, to_signed, to_unsigned, unpack_pairs, unpack_words, words_of
from qcli.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

_COMPANIONS = (
    *("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale"),
    *("input_scale", "input_global_scale"),
)
_UNUSED = ("weight_shape", "input_zero_point")
_CONFIG: Mapping[str, Kind | Required] = {
    "quant_method": TEXT,
    "format": Required(one_of(*groups.LAYOUTS, groups.MIXED)),
    "config_groups": Required(map_of(OBJECT)),
    "ignore": list_of(TEXT),
    "quantization_status": one_of("compressed"),
}
_FLOATS = tuple(CODES[name] for name in MODEL_DTYPES)
_WRITTEN_BITS = (2, 3, 4, 8)  # of integers


class CompressedTensors(Plain):
    """See the module and qcli.formats.Format."""

    name = "compressed-tensors"
    library = "compressed-tensors"
    fields = _CONFIG
    hint = "Load it with transformers."
    skip_list = "ignore"

    def refuses(self, scheme: Scheme) -> str | None:
        in_rows = scheme.share in ("group", "row") and scheme.scale == "model"
        integers = scheme.codebook is None and in_rows and scheme.bits in _WRITTEN_BITS and not scheme.keeps_original
        plain = integers and not scheme.threshold and (scheme.activations is None or not scheme.zero_point)
        if plain or scheme.codebook in ("e2m1", "e4m3"):
            return None
        return f"{self.name} holds integers in groups or rows, int8 with rounded activations, and small floats, not {scheme.name}"

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        return ragged_groups(scheme, in_features)

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        if reason := self.refuses(head):
            return reason
        return f"{self.name} has no quantized embedding, and the head is tied to it" if tied else None

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        return _tensors(weight, scheme, groups.layout_of(scheme))

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        import torch

        from qcli.ops.pack_codes import pack_codes

        module, layout = weight.name.removesuffix("weight"), groups.layout_of(scheme)
        packed = {spec.name: spec for spec in _tensors(weight, scheme, layout)}
        codes = f"{module}weight" if f"{module}weight" in packed else f"{module}weight_packed"
        if "codes" in parts:
            found, row_bytes = parts["codes"], packed[codes].nbytes // weight.out_features
            if layout == groups.PACKED:
                found = pack_codes(found, scheme.bits, "rows")
            elif codes.endswith("packed"):
                found = pack_codes(found, 4, "rows") if weight.in_features % 8 == 0 else pack_pairs(found)
            yield Piece(codes, start // weight.in_features * row_bytes, found)
        if "scale" not in parts:
            return
        yield Piece(f"{module}weight_scale", 0, parts["scale"])
        if layout == groups.PACKED:
            yield Piece(f"{module}weight_shape", 0, torch.tensor([weight.out_features, weight.in_features]))
        if "global_scale" in parts:
            yield Piece(f"{module}weight_global_scale", 0, parts["global_scale"])
        if f"{module}input_global_scale" in packed:
            yield Piece(f"{module}input_global_scale", 0, torch.ones(1))
        if scheme.zero_point:
            along_rows = to_unsigned(parts["zero_point"], scheme.bits).t().contiguous()
            yield Piece(f"{module}weight_zero_point", 0, pack_words(along_rows, scheme.bits).t().contiguous())

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        codes, scheme = tensors["weight"], stored.scheme
        if codes.element_size() == 4:
            return to_signed(unpack_words(codes, scheme.bits, stored.in_features), scheme.bits)
        return unpack_pairs(codes) if scheme.codebook == "e2m1" else codes

    def pairs(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        import torch

        codes, scheme = tensors["weight"], stored.scheme
        if scheme.codebook == "e2m1":
            return codes
        packed = scheme.bits == 4 and codes.element_size() == 4 and stored.in_features % 8 == 0
        return codes.contiguous().view(torch.uint8) if packed else None

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        scheme, rows, columns = stored.scheme, stored.out_features, stored.in_features
        scale, zero_point = tensors["weight_scale"].reshape(scheme.scale_shape(rows, columns)), tensors.get("weight_zero_point")
        found = {"scale": scale}
        if zero_point is not None and zero_point.element_size() == 4:
            zero_point = to_signed(unpack_words(zero_point.t().contiguous(), scheme.bits, rows).t(), scheme.bits)
        if zero_point is not None:
            found["zero_point"] = zero_point.reshape(scale.shape).contiguous()
        names = {"weight_global_scale": "global_scale", "weight_g_idx": "group_of_column"}
        return found | {role: tensors[name] for name, role in names.items() if tensors.get(name) is not None}

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        modules: dict[Scheme, list[str]] = {}
        for module, scheme in choice.schemes.items():
            modules.setdefault(scheme, []).append(module)
        choice.problems += conv1d_problems(choice, self.name)
        choice.notes += fused_notes(choice)
        choice.notes += groups.reader_notes(list(modules))
        left = {*choice.layout.default_skip, *choice.layout.candidates} - set(choice.schemes)
        layouts = {groups.layout_of(scheme) for scheme in modules}
        return {
            "config_groups": {
                f"group_{number}": groups.group_config(scheme, ["Linear"] if len(modules) == 1 else sorted(names))
                for number, (scheme, names) in enumerate(modules.items())
            },
            "format": next(iter(layouts)) if len(layouts) == 1 else groups.MIXED,
            "global_compression_ratio": None,
            "ignore": sorted(left),
            "kv_cache_scheme": None,
            "quant_method": self.name,
            "quantization_status": "compressed",
        }

    def weight_name(self, tensor: str) -> str:
        return f"{tensor.removesuffix('_packed')}" if tensor.endswith(".weight_packed") else tensor

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        owners = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last in _COMPANIONS and f"{module}.weight_scale" in tensors:
                packed, plain = f"{module}.weight_packed", f"{module}.weight"
                if packed in tensors or plain in tensors:
                    owners[name] = packed if packed in tensors else plain
        return owners

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        module = codes.rpartition(".")[0]
        scale = tensors.get(f"{module}.weight_scale")
        if not codes.endswith((".weight_packed", ".weight")) or scale is None or len(tensors[codes].shape) != 2:
            return None
        group = groups.group_for(module, config) if config is not None and self.passes(config) else None
        if group is not None:
            return group.scheme
        return _by_headers(tensors[codes], scale, f"{module}.weight_zero_point" in tensors, groups.one_number_of_bits(config))

    def parameters_in(self, info: "TensorInfo", scheme: Scheme, config: Mapping[str, Any] | None) -> int:
        return info.nbytes * 8 // scheme.bits if info.name.endswith("_packed") else info.numel

    def in_memory(self, spec: "TensorSpec | TensorInfo") -> bool:
        return not spec.name.endswith(_UNUSED)

    def check(self, config: Mapping[str, Any], label: str) -> None:
        super().check(config, label)
        for name, group in config["config_groups"].items():
            groups.check_group(group, f"{label}.config_groups.{name}")
            if group.get("format") is None and config["format"] == groups.MIXED:
                raise CheckpointError(f"{label}.config_groups.{name} has no format, and the model's is {groups.MIXED}", self.hint)

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        from qcli.formats._reading import read_each

        return read_each(source, linears, partial(self._read, groups.groups_of(config)))

    def attribute(self, name: str) -> str:
        return "weight" if name == "weight_packed" else name

    def renamings(self) -> list[tuple[str, str]]:
        return [("weight_packed$", "weight")]

    def _read(self, stated: list[groups.Group], source: "Source", linear: Linear) -> Stored | None:
        from qcli.formats._reading import Problem, expect, present

        module, _, last = linear.tensor.rpartition(".")
        if f"{module}.weight_scale" not in source.tensors:
            if last != "weight_packed":
                return None
            raise Problem(f"{linear.tensor} lacks {module}.weight_scale")
        if last == "weight" and source.tensors[linear.tensor].dtype in _FLOATS:  # left alone, though a target names it
            return None
        group = next((each for each in stated if each.holds(linear.module)), None)
        if group is None:
            raise Problem(f"{linear.tensor} is stored, and no group of the config targets {linear.module}")
        scheme = group.scheme
        if scheme.share == "group" and linear.in_features % scheme.size:
            raise Problem(f"{linear.tensor}: groups of {scheme.size} do not divide rows of {linear.in_features}")
        weight = Weight(f"{module}.weight", linear.out_features, linear.in_features, "BF16")
        for spec in _tensors(weight, scheme, group.layout):
            if spec.name.endswith("weight_shape") and spec.name not in source.tensors:
                continue
            if spec.name not in source.tensors:
                raise Problem(f"{linear.tensor} lacks {spec.name}")
            of_model = scheme.scale == "model" and spec.name.endswith("scale")
            if of_model and spec.shape[1:] == (1,):  # some write one dimension
                spec = TensorSpec(spec.name, spec.dtype, spec.shape[:1])
            expect(source, spec.name, _FLOATS if of_model else (spec.dtype,), spec.shape)
        stray = f"{module}.weight_zero_point"
        if not scheme.zero_point and stray in source.tensors:
            raise Problem(f"{stray} is stored, and the config says symmetric")
        if (order := f"{module}.weight_g_idx") in source.tensors:
            expect(source, order, ("I32", "I64"), (linear.in_features,))
        names = {self.attribute(name): f"{module}.{name}" for name in (last, *_COMPANIONS) if name not in _UNUSED}
        return Stored(self.name, scheme, linear.out_features, linear.in_features, present(source, names))


def _tensors(weight: Weight, scheme: Scheme, layout: str) -> list[TensorSpec]:
    """What a layout stores for a weight."""
    module, rows, columns = weight.name.removesuffix("weight"), weight.out_features, weight.in_features
    scales = scheme.scale_shape(rows, columns)
    of_scale = {"e8m0": "U8", "e4m3": "F8_E4M3"}.get(scheme.scale, weight.dtype)
    specs = [TensorSpec(f"{module}weight_scale", of_scale, (1,) if scheme.share == "tensor" else scales)]
    if layout == groups.PACKED:
        specs.insert(0, TensorSpec(f"{module}weight_packed", "I32", (rows, words_of(columns, scheme.bits))))
        specs.append(TensorSpec(f"{module}weight_shape", "I64", (2,)))
        if scheme.zero_point:
            specs.append(TensorSpec(f"{module}weight_zero_point", "I32", (words_of(rows, scheme.bits), scales[1])))
        return specs
    if layout in (groups.NVFP4, groups.MXFP4):
        specs.insert(0, TensorSpec(f"{module}weight_packed", "U8", (rows, -(-columns // 2))))
    else:
        specs.insert(0, TensorSpec(f"{module}weight", "F8_E4M3" if scheme.codebook else "I8", (rows, columns)))
    if scheme.scale == "e4m3":
        specs.append(TensorSpec(f"{module}weight_global_scale", "F32", (1,)))
        if scheme.activations:
            specs.append(TensorSpec(f"{module}input_global_scale", "F32", (1,)))
    if scheme.activations == "static" and scheme.scale == "model":
        specs.append(TensorSpec(f"{module}input_scale", weight.dtype, (1,)))
    if scheme.zero_point:
        specs.append(TensorSpec(f"{module}weight_zero_point", "I8", scales))
    return specs


def _by_headers(codes: "TensorInfo", scale: "TensorInfo", zero_point: bool, stated: int | None) -> Scheme | None:
    """The scheme of a weight whose group the config does not tell. Packed codes have the bits that are `stated`, or 4, which nearly
    all such files have."""
    if len(scale.shape) != 2 or not scale.shape[1] or codes.dtype not in ("I32", "U8", "I8", "F8_E4M3"):
        return None
    bits = (stated or 4) if codes.dtype == "I32" else 4 if codes.dtype == "U8" else 8
    size = codes.nbytes * 8 // bits // max(codes.shape[0] * scale.shape[1], 1)
    found = Scheme(f"w{bits}a16", "rtn", bits, "group", max(size, 1), zero_point=zero_point, scale="model")
    if codes.dtype == "U8":
        return replace(found, codebook="e2m1", scale="e8m0" if scale.dtype == "U8" else "e4m3")
    return replace(found, codebook="e4m3" if codes.dtype == "F8_E4M3" else None)


FORMAT: Format = CompressedTensors()
