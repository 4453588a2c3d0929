"""Opens a checkpoint to run it: what of it is quantized in bitsandbytes' format, read off its headers.

The headers decide which module is quantized and how; the config only says how to compute. Every stored field that changes
what bytes mean is held against what qcli's kernels do with them.
"""

import warnings
from math import prod

import numpy as np

from qcli.checkpoint import dtypes
from qcli.checkpoint.modules import Layout
from qcli.checkpoint.safetensors_file import TensorInfo, read_into
from qcli.checkpoint.source import Source, open_source
from qcli.codebooks import CODEBOOKS, DYNAMIC_MAP
from qcli.errors import CheckpointError, QcliWarning
from qcli.files.foreign_json import FLAG, NUMBER, TEXT, Required, at_least, check, list_of, one_of, parse_object, whole
from qcli.formats.bitsandbytes import NESTED_BLOCK_SIZE
from qcli.loading.transformers_quantizer import NAME, PARTS_4BIT

_CONFIG = {
    "quant_method": TEXT,
    "load_in_4bit": FLAG,
    "load_in_8bit": FLAG,
    "_load_in_4bit": FLAG,
    "_load_in_8bit": FLAG,
    "bnb_4bit_compute_dtype": one_of(*dtypes.MODEL_DTYPES, *(f"torch.{name}" for name in dtypes.MODEL_DTYPES)),
    "bnb_4bit_quant_storage": TEXT,
    "bnb_4bit_quant_type": one_of("nf4", "fp4"),
    "bnb_4bit_use_double_quant": FLAG,
    "llm_int8_threshold": at_least(0),
    "llm_int8_skip_modules": list_of(TEXT),
    "llm_int8_has_fp16_weight": FLAG,
}
_QUANT_STATE = {
    "quant_type": Required(one_of("nf4", "fp4")),
    "blocksize": Required(whole(1, 1 << 20)),
    "dtype": Required(one_of(*dtypes.MODEL_DTYPES)),
    "shape": Required(list_of(whole(1), 2)),
    "nested_blocksize": one_of(NESTED_BLOCK_SIZE),
    "nested_dtype": one_of("float32"),
    "nested_offset": NUMBER,
}
_ROW_FORMAT = 0  # of weight_format: rows as they are; others interleave them for kernels that are no longer made
_NAMED = 5  # problems that a message names


def open_checkpoint(model: str, revision: str | None, trust_remote_code: bool) -> Source:
    """The checkpoint of a folder or hub id, whole as far as headers show, and unquantized or in bitsandbytes' format.

    Warns of what is odd about it. Raises CheckpointError, HubError.
    """
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    if source.problems:
        raise CheckpointError(f"{model}: {source.problems[0]}", source.again())
    for note in source.notes:
        warnings.warn(f"{model}: {note}", QcliWarning, stacklevel=2)
    stored = source.quantization
    if stored:
        check(stored, _CONFIG, f"{model}/config.json: quantization_config", "Mend the file, or fetch it again.")
        if stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
            raise CheckpointError(
                f"{model} is quantized by {stored['quant_method']}, which qcli does not run; it runs bitsandbytes' format",
                "Load it with transformers.",
            )
    return source


def read_stored(source: Source, layout: Layout, stored: dict, dtype: str) -> dict:
    """What our quantizer must know of a bitsandbytes checkpoint: each quantized module's scheme and stored shapes.

    `stored` is the config's quantization_config, `dtype` "auto" or what to compute in. Raises CheckpointError.
    """
    modules, problems = {}, []
    for tensor, linear in layout.linears.items():
        try:
            read = _int8(source, tensor, linear) or _4bit(source, tensor, linear)
        except _Problem as e:
            problems.append(str(e))
            continue
        if read is not None:
            modules[linear.module] = read
    if problems:
        more = f"; and {len(problems) - _NAMED:,} more" if len(problems) > _NAMED else ""
        raise CheckpointError(f"{source.label}: {'; '.join(problems[:_NAMED])}{more}", made_again(source))
    compute = (stored.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    return {
        "quant_method": NAME,
        "modules": modules,
        "compute_dtype": compute,
        "threshold": float(6.0 if stored.get("llm_int8_threshold") is None else stored["llm_int8_threshold"]),
    }


def quantized_weights(source: Source) -> set[str]:
    """Names of the weights beside which an SCB or a quant_state lies."""
    found = {f"{name.removesuffix('SCB')}weight" for name in source.tensors if name.endswith(".SCB")}
    return found | {name.partition(".quant_state.")[0] for name in source.tensors if ".quant_state." in name}


def made_again(source: Source) -> str:
    """What to do about a quantized checkpoint that is damaged: qcli's own can be made again."""
    if source.is_hub or "qcli.json" not in source.place.names:
        return source.again("Fetch it again, or ask whoever made it.")
    return "Quantize the model again."


class _Problem(Exception):
    """A module that cannot be decoded; the message is for the list of them."""


def _int8(source: Source, tensor: str, linear) -> dict | None:
    base = tensor.removesuffix("weight")
    if f"{base}SCB" not in source.tensors:
        return None
    names = {"weight": tensor, "SCB": f"{base}SCB", "weight_format": f"{base}weight_format"}
    shape = (linear.out_features, linear.in_features)
    _expect(source, tensor, ("I8",), shape)
    _expect(source, names["SCB"], ("F32",), (linear.out_features,))
    if names["weight_format"] in source.tensors:
        data = _read(source, names["weight_format"])
        if any(data) or len(data) > 8:
            raise _Problem(f"{names['weight_format']} is {list(data[:8])}, and only {_ROW_FORMAT}, plain rows, is read")
    return {"bits": 8, "in_features": shape[1], "out_features": shape[0], "tensors": _present(source, names)}


def _4bit(source: Source, tensor: str, linear) -> dict | None:
    states = {name: f"{tensor}.quant_state.bitsandbytes__{name}" for name in ("nf4", "fp4")}
    quant_type = next((name for name, state in states.items() if state in source.tensors), None)
    if quant_type is None:
        return None
    state_name = states[quant_type]
    label = f"{source.label}: {state_name}"
    state = parse_object(_read(source, state_name), label, made_again(source))
    check(state, _QUANT_STATE, label, made_again(source))
    nested = state.get("nested_offset") is not None
    names = {"weight": tensor, "weight_quant_state": state_name}
    names |= {f"weight_{part}": f"{tensor}.{part}" for part in PARTS_4BIT}
    lacking = [f"{tensor}.{p}" for p in (PARTS_4BIT if nested else PARTS_4BIT[:2]) if f"{tensor}.{p}" not in source.tensors]
    if lacking:
        raise _Problem(f"{tensor} lacks {', '.join(lacking)}")
    if state["quant_type"] != quant_type:
        raise _Problem(f"{state_name} says quant_type {state['quant_type']}")
    expected = [linear.out_features, linear.in_features]
    if state["shape"] != expected:
        raise _Problem(f"{state_name} says shape {state['shape']}, the model expects {expected}")
    if not nested and f"{tensor}.nested_absmax" in source.tensors:
        raise _Problem(f"{state_name} has no nested_offset, and {tensor}.nested_absmax is there")
    _check_4bit_sizes(source, tensor, prod(expected), state["blocksize"], nested)
    _check_table(source, f"{tensor}.quant_map", CODEBOOKS[quant_type], quant_type)
    if nested:
        _check_table(source, f"{tensor}.nested_quant_map", DYNAMIC_MAP, "double quantization")
    return {
        "bits": 4,
        "in_features": expected[1],
        "out_features": expected[0],
        "quant_type": quant_type,
        "block_size": state["blocksize"],
        "nested_offset": state.get("nested_offset"),
        "tensors": _present(source, names),
    }


def _check_4bit_sizes(source: Source, tensor: str, count: int, block_size: int, nested: bool) -> None:
    info = source.tensors[tensor][1]
    # bnb_4bit_quant_storage may call the bytes another dtype, so that they can be sharded beside 16-bit weights.
    if info.nbytes != -(-count // 2) or info.dtype not in ("U8", "I8", *dtypes.FLOATS):
        raise _Problem(f"{tensor} holds {info.nbytes:,} bytes of {info.dtype}, expected {-(-count // 2):,} for {count:,} codes")
    blocks = -(-count // block_size)
    _expect(source, f"{tensor}.absmax", ("U8",) if nested else ("F32",), (blocks,))
    _expect(source, f"{tensor}.quant_map", ("F32",), (16,))
    if nested:
        _expect(source, f"{tensor}.nested_absmax", ("F32",), (-(-blocks // NESTED_BLOCK_SIZE),))
        _expect(source, f"{tensor}.nested_quant_map", ("F32",), (256,))


def _check_table(source: Source, name: str, table: np.ndarray, what: str) -> None:
    """Kernels decode by their own table, so the stored one must be the same, to the rounding of whoever wrote it."""
    stored = np.frombuffer(_read(source, name), dtype="<f4")
    if not np.allclose(stored, table, rtol=1e-4, atol=1e-7):
        raise _Problem(f"{name} is not the table of {what}, by which qcli decodes")


def _expect(source: Source, name: str, allowed: tuple[str, ...], shape: tuple[int, ...]) -> None:
    info = source.tensors[name][1]
    if info.dtype not in allowed or prod(info.shape) != prod(shape) or (len(shape) > 1 and info.shape != shape):
        raise _Problem(f"{name} is {info.dtype} of shape {list(info.shape)}, expected {' or '.join(allowed)} of {list(shape)}")


def _present(source: Source, names: dict[str, str]) -> dict[str, list]:
    """[dtype, shape] of each attribute whose tensor is stored."""
    found: dict[str, TensorInfo] = {a: source.tensors[name][1] for a, name in names.items() if name in source.tensors}
    return {attribute: [info.dtype, list(info.shape)] for attribute, info in found.items()}


def _read(source: Source, name: str) -> bytes:
    file, info = source.tensors[name]
    data = bytearray(info.nbytes)
    with source.open(file) as fd:
        read_into(fd, info.start, memoryview(data))
    return bytes(data)
