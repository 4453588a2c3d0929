"""Parameters from a checkpoint's headers: any model, quantized or not.

A packed weight counts with its stored bytes, those of its companions (scales, zero points, absmax) included. It stands for as many
elements as its format says. Some tensors are left out, because transformers does not load them or keeps them once: buffers, tied
heads, second copies of an embedding, and layers for multi-token prediction.
"""

import re
from collections.abc import Mapping
from math import prod

from qcli import formats
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import Source
from qcli.errors import UsageError
from qcli.formats._schemes_config import shape_of
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.families import shapes_of
from qcli.memory.model.tensor_rules import Parameter, layer_of, parameter
from qcli.schemes import NAMED, Scheme
from qcli.sizes import format_bytes

_PLAIN = ("F64", "F32", "F16", "BF16")
_PACKED = ("qweight", "weight_packed")  # GPTQ and AWQ; compressed-tensors
_COMPANIONS = {
    "qzeros",
    "scales",
    "g_idx",
    "weight_scale",
    "weight_scale_inv",
    "weight_scale_2",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_global_scale",
}
_BUFFER = re.compile(r"(?:inv_freq|masked_bias|position_ids|\.attn\.bias|\.attention\.bias)$")
_PREDICTION = re.compile(r"(?:^|\.)mtp\w*\.")


def parameters_of(source: Source, config: ModelConfig) -> list[Parameter]:
    """The parameters of the checkpoint `source`, whose config.json is `config`. `config.assumed` names what was left out."""
    groups: dict[str, list[TensorInfo]] = {}
    known = {name: weight for each in formats.all_formats() for name, weight in each.companions(source.tensors).items()}
    for name, info in source.tensors.items():
        groups.setdefault(_owner(known.get(name, name), source.tensors), []).append(info)
    quantization = config.quantization if isinstance(config.quantization, dict) else {}
    # Headers of 4-bit bitsandbytes weights have no shapes. The family may know them.
    shapes = (shapes_of(config) if quantization else None) or {}
    predicting = _prediction_layers(config)
    found, ignored = [], 0
    for name, infos in groups.items():
        main = next((info for info in infos if info.name == name), None) or max(infos, key=lambda info: info.nbytes)
        stored = sum(info.nbytes for info in infos if all(each.in_memory(info) for each in formats.all_formats()))
        if _is_buffer(name, main.shape):
            continue
        if layer_of(name) in predicting or _PREDICTION.search(name):
            ignored += stored
            continue
        known_scheme = _known_scheme(main, infos, quantization)
        scheme = known_scheme.name if known_scheme else _other_scheme(main, quantization)
        bits = known_scheme.bits if known_scheme else 0
        shape = _logical_shape(main, infos, scheme, bits, quantization, shapes.get(name, ()))
        if known_scheme and len(shape) == 2:
            stored = formats.held_bytes(known_scheme, *shape) or stored
        found.append(parameter(name, shape, config, scheme, stored))
    if ignored:
        config.assume(
            f"{format_bytes(ignored)} of layers that predict further tokens are left out: transformers does not load them."
        )
    return _without_copies(found, config)


def _owner(name: str, tensors: Mapping[str, object]) -> str:
    """The parameter to which a stored tensor belongs, in formats that qcli does not read. A tensor of codes or scales belongs to
    their weight, any other to itself."""
    module, _, leaf = name.rpartition(".")
    if leaf in _PACKED:
        return f"{module}.weight"
    if leaf in _COMPANIONS and any(f"{module}.{main}" in tensors for main in ("weight", *_PACKED)):
        return f"{module}.weight"
    for end in ("_blocks", "_scales"):  # MXFP4, as gpt-oss stores its experts
        stem = name.removesuffix(end)
        if stem != name and f"{stem}_blocks" in tensors:
            return stem
    return name


def _is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a table in an old checkpoint (causal masks, rotary frequencies) that transformers computes itself."""
    return bool(_BUFFER.search(name)) and (len(shape) == 4 or not name.endswith(".bias"))


def _prediction_layers(config: ModelConfig) -> range:
    """The numbers of the layers that predict further tokens. DeepSeek-V3's checkpoint numbers them after its other layers."""
    extra = config.integer("num_nextn_predict_layers", default=0)
    return range(config.layers, config.layers + extra) if extra else range(0)


def _known_scheme(main: TensorInfo, infos: list[TensorInfo], quantization: Mapping) -> Scheme | None:
    """The scheme in which a weight is stored, in a format that qcli reads."""
    by_name = {info.name: info for info in infos}
    for each in formats.read_formats():
        if found := each.scheme_of(main.name, by_name, quantization):
            return found
    return None


def _other_scheme(main: TensorInfo, quantization: Mapping) -> str | None:
    """What else a stored tensor says of itself; None for a plain weight."""
    if main.dtype in _PLAIN:
        return None
    leaf = main.name.rpartition(".")[2]
    if leaf in _PACKED or leaf.endswith("_blocks"):
        return str(quantization.get("quant_method", main.dtype))
    return main.dtype


def _logical_shape(
    main: TensorInfo, infos: list[TensorInfo], scheme: str | None, bits: int, quantization: Mapping, known: tuple[int, ...]
) -> tuple[int, ...]:
    """The shape of the weight that the stored tensor stands for. `known` is its shape by the family's rules, if there are any."""
    leaf, shape = main.name.rpartition(".")[2], main.shape
    if listed := shape_of(main.name, quantization):
        return listed
    rows = next((info.numel for info in infos if info.name.endswith(".SCB")), None)
    if rows and main.dtype == "I8" and shape[-1] == 1:  # qcli's format lays codes out in one column
        return (rows, main.numel // rows)
    if scheme in NAMED and NAMED[scheme].share == "flat":
        count = 8 * main.nbytes // NAMED[scheme].bits
        return known if prod(known) in (count, count - 1) else (1, count)
    if leaf.endswith("_blocks") and len(shape) > 2:
        return (*shape[:-2], shape[-2] * shape[-1] * 2)
    if len(shape) != 2:
        return shape
    rows, columns = shape
    if leaf == "qweight":  # GPTQ packs along the rows of its transposed weight, AWQ along the columns
        of_awq = quantization.get("quant_method") == "awq" or str(quantization.get("packing_format")).endswith("awq")
        bits = bits or _bits(quantization)
        return (columns * 32 // bits, rows) if of_awq else (columns, rows * 32 // bits)
    if leaf == "weight_packed" and main.dtype == "I32":
        return (rows, columns * 32 // (bits or _bits(quantization)))
    # NVFP4, of compressed-tensors or ModelOpt: two codes a byte
    pairs = main.dtype == "U8" and any(info.name.endswith(".weight_scale") for info in infos)
    return (rows, columns * 2) if pairs else shape


def _bits(quantization: Mapping) -> int:
    """Bits of each code in a checkpoint that packs codes into 32-bit words; 4 where the config does not name them."""
    groups = quantization.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    given = next((w["num_bits"] for w in weights if isinstance(w, dict) and w.get("num_bits")), None)
    bits = given or quantization.get("bits") or quantization.get("w_bit") or 4
    if bits not in (2, 3, 4, 8):
        raise UsageError(f"the quantization_config names {bits!r} bits, expected 2, 3, 4 or 8.")
    return bits


def _without_copies(found: list[Parameter], config: ModelConfig) -> list[Parameter]:
    """`found` without tied heads and without the copies of a shared embedding that old checkpoints hold."""
    embeddings = [p for p in found if p.kind == "embedding"]
    shared = next((p for p in embeddings if p.name.endswith("shared.weight")), None)
    tokens = shared or max(embeddings, key=lambda p: p.numel, default=None)
    if tokens is None:
        return found
    heads = [p for p in found if p.kind == "head" and p.numel == tokens.numel]
    copies = [p for p in embeddings if shared and p is not shared and p.shape == shared.shape]
    if config.tied_embeddings:
        copies += heads
    elif not heads:
        config.assume(f"No output head is stored in {config.label}'s checkpoint: the embedding is taken for the head.")
    return [p for p in found if p not in copies]
