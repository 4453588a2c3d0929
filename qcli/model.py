"""Loads a model through transformers' own from_pretrained, with a quantizer registered there that puts our modules in.

Renames, fused experts, tied weights and buffers stay transformers' business. A checkpoint in bitsandbytes' format is loaded
without bitsandbytes; an unquantized one can be quantized as it is read, one weight at a time, so that the full-precision
model never exists in memory.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import transformers

from qcli import methods, out_of_memory
from qcli.checkpoint import dtypes
from qcli.checkpoint.linears import Layout, find_linears
from qcli.checkpoint.source import Source
from qcli.devices import Placement, place
from qcli.errors import CheckpointError, UsageError
from qcli.memory.check import check_room
from qcli.nn import Linear8bit
from qcli.process import available_memory
from qcli.quantizer import LoadingStopped, NoRoom, QcliConfig, misshaped
from qcli.settings import one_of
from qcli.stored import open_checkpoint, read_stored


def load(
    model: str,
    *,
    bits: int | None = None,
    method: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
    int8_activations: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """Returns (transformers model, tokenizer or None) of a folder or hub id; the model's own `.generate()` works.

    A checkpoint quantized by qcli, or by transformers with bitsandbytes, is run as it is stored. `bits` (8 or 4) or `method`
    quantizes an unquantized one as it is read. `dtype` is that of everything unquantized: auto keeps the config's.
    `device_map` "auto" splits the model over GPUs and CPU memory by accelerate's rules, quantized on each; `max_memory` limits
    it per GPU or "cpu": {0: "20GB", "cpu": 30 * 10**9}, or "0=20GB,cpu=30GB". Without `int8_activations` an LLM.int8() model
    keeps its activations in 16 bits.

    Raises UsageError, CheckpointError (missing, extra and misshaped tensors together), HubError, DeviceError.
    """
    one_of("dtype", dtype, ("auto", *dtypes.MODEL_DTYPES))
    placement = place(device, device_map, max_memory)
    source = open_checkpoint(model, revision, trust_remote_code)
    stored = source.config.get("quantization_config")
    wanted = methods.method_name(bits, method) if bits is not None or method is not None else None
    if stored and wanted:
        raise CheckpointError(f"{model} is quantized already", "Leave out --bits and --method.")
    _check_room(source, wanted, dtype, placement)
    files = [source.place.weights(file) for file in source.files]
    for name in source.extra_files:
        source.extra_path(name)
    folder = source.config_folder
    free = out_of_memory.free_memory(placement.gpus())

    def layout() -> Layout:
        return find_linears(source, trust_remote_code=trust_remote_code)

    with quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if stored:
            config.quantization_config = read_stored(source, layout(), stored, dtype)
        elif wanted:
            options["quantization_config"] = QcliConfig(method=wanted)
        try:
            loaded, info = model_class(config, trust_remote_code).from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True,
                trust_remote_code=trust_remote_code, use_safetensors=files[0].suffix == ".safetensors",
                **placement.arguments(), **options,
            )  # fmt: skip
            if "disk" in (getattr(loaded, "hf_device_map", None) or {}).values():
                raise NoRoom
        except NoRoom:
            raise out_of_memory.without_room(source, layout(), wanted, dtype, placement.limits()) from None
        except (*out_of_memory.KINDS, LoadingStopped) as e:
            if not isinstance(e, LoadingStopped) and not out_of_memory.is_one(e):
                raise
            split = device_map is not None
            raise out_of_memory.while_loading(source, layout(), wanted, dtype, free, split) from e
        if stored or wanted:
            info["mismatched_keys"] = {*info["mismatched_keys"], *misshaped(loaded, loaded.hf_quantizer)}
        _check_complete(model, info)
        tokenizer = read_tokenizer(source, trust_remote_code)
    if not int8_activations:
        _keep_activations(model, loaded)
    return loaded.eval(), tokenizer


def _check_room(source: Source, wanted: str | None, dtype: str, placement: Placement) -> None:
    """Refuses, before weights are fetched or read, what a single device has no room for. Splits find their own room."""
    if set(placement.device_map) != {""}:
        return
    gpus = placement.gpus()
    if gpus:
        check_room(source, wanted, dtype, out_of_memory.free_memory(gpus)[gpus[0]][0], "GPU memory")
        return
    # On a CPU unquantized weights stay in the mapped file, whose pages the system takes back as it needs.
    mapped = wanted is None and not source.config.get("quantization_config") and dtype == "auto"
    free = available_memory()
    if free is not None and not mapped:
        check_room(source, wanted, dtype, free, "memory")


def _keep_activations(label: str, loaded: torch.nn.Module) -> None:
    modules = [module for module in loaded.modules() if isinstance(module, Linear8bit)]
    if not modules:
        raise UsageError(
            f"--no-int8-activations: {label} is not in LLM.int8()",
            "Leave it out, or add --bits 8 to an unquantized model.",
        )
    for module in modules:
        module.activations_in_int8 = False


def model_class(config, trust_remote_code: bool):
    name = (getattr(config, "architectures", None) or [None])[0]
    known = getattr(transformers, name, None) if name else None
    if known is not None and not (trust_remote_code and getattr(config, "auto_map", None)):
        return known
    return transformers.AutoModelForCausalLM


def read_tokenizer(source: Source, trust_remote_code: bool):
    if not any(n.startswith(("tokenizer", "vocab", "spiece")) or n.endswith(".tiktoken") for n in source.extra_files):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(source.config_folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as e:
        reason = str(e).strip().splitlines()[0]
        raise CheckpointError(
            f"{source.label}: its tokenizer cannot be loaded: {reason}", "Fetch its files again."
        ) from e


def _check_complete(label: str, info: dict) -> None:
    missing, extra = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    misshaped = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if missing or misshaped:
        parts = [
            f"{len(names)} {kind} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for kind, names in (("missing", missing), ("misshaped", misshaped), ("extra", extra))
            if names
        ]
        raise CheckpointError(
            f"{label} does not fit its model: {'; '.join(parts)}", "Fetch or quantize the model again."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and advice, and accelerate's, off while it loads."""
    models, hooks = transformers.utils.logging, logging.getLogger("accelerate")
    verbosity, level, bars = models.get_verbosity(), hooks.level, models.is_progress_bar_enabled()
    models.set_verbosity_error()
    hooks.setLevel(logging.ERROR)
    models.disable_progress_bar()
    try:
        yield
    finally:
        models.set_verbosity(verbosity)
        hooks.setLevel(level)
        if bars:
            models.enable_progress_bar()
