"""Opens a checkpoint to run it: what of it is quantized in bitsandbytes' format, read off its headers."""

import json

from qcli.checkpoint.linears import Layout
from qcli.checkpoint.safetensors_file import read_into
from qcli.checkpoint.source import Source, open_source
from qcli.errors import CheckpointError
from qcli.quantizer import NAME, PARTS_4BIT


def open_checkpoint(model: str, revision: str | None, trust_remote_code: bool) -> Source:
    """The checkpoint of a folder or hub id, whole as far as headers show, and unquantized or in bitsandbytes' format.

    Raises CheckpointError, HubError.
    """
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    if source.problems:
        raise CheckpointError(f"{model}: {source.problems[0]}", "Fetch the model again.")
    stored = source.config.get("quantization_config")
    if stored and stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise CheckpointError(
            f"{model} is quantized by {stored['quant_method']}, which qcli does not run; it runs bitsandbytes' format",
            "Load it with transformers.",
        )
    return source


def read_stored(source: Source, layout: Layout, stored: dict, dtype: str) -> dict:
    """What our quantizer must know of a bitsandbytes checkpoint: each quantized module's scheme and stored shapes."""
    modules, problems = {}, []
    for tensor, linear in layout.linears.items():
        base = tensor.removesuffix("weight")
        if f"{base}SCB" in source.tensors:
            names = {"weight": tensor, "SCB": f"{base}SCB", "weight_format": f"{base}weight_format"}
            spec = {"bits": 8, "in_features": linear.in_features, "out_features": linear.out_features}
        else:
            states = (f"{tensor}.quant_state.bitsandbytes__{name}" for name in ("nf4", "fp4"))
            state = next((name for name in states if name in source.tensors), None)
            if state is None:
                continue
            quant_state = _read_json(source, state)
            names = {"weight": tensor, "weight_quant_state": state}
            names |= {f"weight_{part}": f"{tensor}.{part}" for part in PARTS_4BIT}
            nested = "nested_offset" in quant_state
            required = PARTS_4BIT if nested else PARTS_4BIT[:2]
            problems += [f"{tensor}.{p}" for p in required if f"{tensor}.{p}" not in source.tensors]
            out_features, in_features = quant_state["shape"]
            spec = {
                "bits": 4, "in_features": in_features, "out_features": out_features, "quant_type": quant_state["quant_type"],
                "block_size": quant_state["blocksize"], "nested_offset": quant_state.get("nested_offset"),
            }  # fmt: skip
        spec["tensors"] = {
            attribute: [source.tensors[name][1].dtype, list(source.tensors[name][1].shape)]
            for attribute, name in names.items()
            if name in source.tensors
        }
        modules[linear.module] = spec
    if problems:
        raise CheckpointError(
            f"{source.label} lacks {len(problems)} tensors that its quantized weights need: {', '.join(problems[:5])}",
            "Fetch or quantize the model again.",
        )
    left = [
        m for m in layout.candidates if m not in modules and not layout.skipped(m, stored.get("llm_int8_skip_modules"))
    ]
    if left:
        raise CheckpointError(
            f"{source.label}: the config calls {len(left)} modules quantized which are stored unquantized: {', '.join(left[:5])}",
            "Quantize the model again.",
        )
    compute = stored.get("bnb_4bit_compute_dtype") or "float32" if dtype == "auto" else dtype
    return {
        "quant_method": NAME,
        "modules": modules,
        "compute_dtype": compute,
        "threshold": float(stored.get("llm_int8_threshold", 6.0)),
    }


def _read_json(source: Source, name: str) -> dict:
    file, info = source.tensors[name]
    data = bytearray(info.nbytes)
    with source.open(file) as fd:
        read_into(fd, info.start, memoryview(data))
    try:
        state = json.loads(data)
        return {key: state[key] for key in ("quant_type", "blocksize", "dtype", "shape")} | state
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{source.label}: {name} holds no valid quant_state", "Quantize the model again."
        ) from None
