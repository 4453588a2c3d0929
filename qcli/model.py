"""Loads a model through transformers' own from_pretrained, with a quantizer registered there that puts our modules in.

Renames, fused experts, tied weights and buffers stay transformers' business. A checkpoint in bitsandbytes' format is loaded
without bitsandbytes; an unquantized one can be quantized as it is read, one weight at a time, so that the full-precision
model never exists in memory.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcli import methods
from qcli.checkpoint import dtypes
from qcli.checkpoint.linears import Layout, find_linears
from qcli.checkpoint.safetensors_file import read_into
from qcli.checkpoint.source import Source, open_source
from qcli.devices import pick_device
from qcli.errors import CheckpointError
from qcli.nn import Linear4bit, Linear8bit
from qcli.settings import one_of

_NAME = "qcli"
_4BIT_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def load(
    model: str,
    *,
    bits: int | None = None,
    method: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """Returns (transformers model, tokenizer or None) of a folder or hub id; the model's own `.generate()` works.

    A checkpoint quantized by qcli, or by transformers with bitsandbytes, is run as it is stored. `bits` (8 or 4) or `method`
    quantizes an unquantized one as it is read. `dtype` is that of everything unquantized: auto keeps the config's.

    Raises UsageError, CheckpointError (missing, extra and misshaped tensors together), HubError, DeviceError.
    """
    one_of("dtype", dtype, ("auto", *dtypes.MODEL_DTYPES))
    target = pick_device(device)
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    if source.problems:
        raise CheckpointError(f"{model}: {source.problems[0]}", "Fetch the model again.")
    stored = source.config.get("quantization_config")
    wanted = methods.method_name(bits, method) if bits is not None or method is not None else None
    if stored and wanted:
        raise CheckpointError(f"{model} is quantized already", "Leave out --bits and --method.")
    if stored and stored.get("quant_method", "bitsandbytes") != "bitsandbytes":
        raise CheckpointError(
            f"{model} is quantized by {stored['quant_method']}, which qcli does not run; it runs bitsandbytes' format",
            "Load it with transformers.",
        )
    files = [source.place.weights(file) for file in source.files]
    for name in source.extra_files:
        source.extra_path(name)
    folder = source.config_folder
    with _quiet():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        options = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        expected = None
        if stored:
            layout = find_linears(source, trust_remote_code=trust_remote_code)
            config.quantization_config, expected = _read_stored(source, layout, stored, dtype)
        elif wanted:
            options["quantization_config"] = QcliConfig(method=wanted)
        result = _model_class(config, trust_remote_code).from_pretrained(
            folder, config=config, device_map={"": target}, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code, use_safetensors=files[0].suffix == ".safetensors", **options,
        )  # fmt: skip
        loaded, info = result
        _check_complete(model, info)
        tokenizer = _tokenizer(source, trust_remote_code)
    return loaded.eval(), tokenizer


def _model_class(config, trust_remote_code: bool):
    name = (getattr(config, "architectures", None) or [None])[0]
    known = getattr(transformers, name, None) if name else None
    if known is not None and not (trust_remote_code and getattr(config, "auto_map", None)):
        return known
    return transformers.AutoModelForCausalLM


def _tokenizer(source: Source, trust_remote_code: bool):
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
def _quiet() -> Iterator[None]:
    """Keeps transformers' bars and advice off while it loads."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _read_stored(source: Source, layout: Layout, stored: dict, dtype: str) -> tuple[dict, set[str]]:
    """What our quantizer must know of a bitsandbytes checkpoint: each quantized module's scheme and stored shapes."""
    modules, problems = {}, []
    for tensor, linear in layout.linears.items():
        base = tensor.removesuffix("weight")
        if f"{base}SCB" in source.tensors:
            names = {"weight": tensor, "SCB": f"{base}SCB", "weight_format": f"{base}weight_format"}
            spec = {"bits": 8, "in_features": linear.in_features, "out_features": linear.out_features}
        else:
            state = next((n for n in source.tensors if n.startswith(f"{tensor}.quant_state.bitsandbytes__")), None)
            if state is None:
                continue
            quant_state = _read_json(source, state)
            names = {"weight": tensor, "weight_quant_state": state}
            names |= {f"weight_{part}": f"{tensor}.{part}" for part in _4BIT_PARTS}
            nested = "nested_offset" in quant_state
            required = _4BIT_PARTS if nested else _4BIT_PARTS[:2]
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
    settings = {
        "quant_method": _NAME,
        "modules": modules,
        "compute_dtype": compute,
        "threshold": float(stored.get("llm_int8_threshold", 6.0)),
    }
    return settings, set(modules)


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


@register_quantization_config(_NAME)
class QcliConfig(QuantizationConfigMixin):
    """Either `modules`, the stored scheme of each quantized module by name, or `method`, to quantize with while reading."""

    def __init__(
        self, modules=None, compute_dtype: str = "auto", threshold: float = 6.0, method: str | None = None, **_
    ):
        self.quant_method = _NAME
        self.modules, self.compute_dtype, self.threshold, self.method = modules, compute_dtype, threshold, method


@register_quantizer(_NAME)
class QcliQuantizer(HfQuantizer):
    """Puts Linear4bit and Linear8bit in place of linear modules before transformers loads the weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            for name, spec in self.quantization_config.modules.items():
                model.set_submodule(name, self._stored_module(model.get_submodule(name), spec))
            return model
        skip = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        layout = Layout("", default_skip=skip)
        for name, module in list(model.named_modules()):
            is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
            if is_linear and not layout.skipped(name, None):
                model.set_submodule(name, self._new_module(module, model.dtype))
        return model

    def _stored_module(self, old: nn.Module, spec: dict) -> nn.Module:
        tensors = {
            name: torch.empty(shape, dtype=dtypes.torch_dtype(code), device="meta")
            for name, (code, shape) in spec["tensors"].items()
        }
        with torch.device("meta"):
            return self._module(old, spec, tensors, getattr(torch, self.quantization_config.compute_dtype))

    def _new_module(self, old: nn.Module, dtype: torch.dtype) -> nn.Module:
        method = methods.make_method(self.quantization_config.method, {})
        out_features, in_features = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
        code = dtypes.CODES[str(dtype).removeprefix("torch.")]
        tensors = {
            _attribute(spec.name): torch.empty(spec.shape, dtype=dtypes.torch_dtype(spec.dtype), device="meta")
            for spec in method.outputs("weight", out_features, in_features, code)
        }
        spec = {"bits": method.bits, "in_features": in_features, "out_features": out_features}
        if method.bits == 4:
            spec |= {"quant_type": method.name, "block_size": method.block_size, "nested_offset": None}
        compute = torch.bfloat16 if dtype == torch.float32 else dtype
        with torch.device("meta"):
            module = self._module(old, spec, tensors, compute)
        module.quantize_with = (method, code, isinstance(old, Conv1D))
        return module

    def _module(self, old: nn.Module, spec: dict, tensors: dict, compute_dtype: torch.dtype) -> nn.Module:
        common = (spec["in_features"], spec["out_features"], getattr(old, "bias", None) is not None)
        if spec["bits"] == 8:
            return Linear8bit(
                *common, tensors=tensors, threshold=self.quantization_config.threshold, dtype=old.weight.dtype
            )
        return Linear4bit(
            *common, tensors=tensors, quant_type=spec["quant_type"], block_size=spec["block_size"],
            nested_offset=spec["nested_offset"], compute_dtype=compute_dtype, dtype=old.weight.dtype,
        )  # fmt: skip

    def get_weight_conversions(self):
        if not self.pre_quantized:
            return []
        renamings = [WeightRenaming(f"weight.{part}$", f"weight_{part}") for part in _4BIT_PARTS]
        states = [f"weight.quant_state.bitsandbytes__{name}$" for name in ("nf4", "fp4")]
        return renamings + [WeightRenaming(state, "weight_quant_state") for state in states]

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and hasattr(model.get_submodule(path), "quantize_with")

    def get_quantize_ops(self):
        return _Quantize()

    def is_serializable(self) -> bool:
        """What is loaded is on disk already, or made by `qcli quantize`."""
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _attribute(stored_name: str) -> str:
    """The attribute of our modules for a stored name: weight.absmax -> weight_absmax."""
    if ".quant_state." in stored_name:
        return "weight_quant_state"
    return stored_name.replace("weight.", "weight_", 1)


class _Quantize(ConversionOps):
    """Quantizes one weight between the file and the module."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        ((name, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        path = name.rpartition(".")[0]
        module = model.get_submodule(path)
        method, code, transposed = module.quantize_with
        if transposed:
            value = value.t().contiguous()
        stream = method.stream("weight", module.out_features, module.in_features, code, value.device)
        tensors = dict(_pieces(stream, value, method.granularity(module.in_features)))
        tensors |= stream.finish().tensors
        if method.bits == 4:
            module.nested_offset = stream.nested_offset
        shape = module.weight.shape
        return {
            f"{path}.{_attribute(key)}": (tensor.view(shape) if key == "weight" else tensor).to(value.device)
            for key, tensor in tensors.items()
        }


def _pieces(stream, value: torch.Tensor, grain: int):
    flat = value.reshape(-1)
    step = max((1 << 21) // grain, 1) * grain
    parts = [piece for chunk in flat.split(step) for _, piece in stream.feed(chunk)]
    yield "weight", torch.cat([part.reshape(-1) for part in parts])
