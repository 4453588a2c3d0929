"""The quantizer that qcli registers with transformers: it puts our modules in place of linear ones before weights load."""

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcli import methods
from qcli.checkpoint import dtypes
from qcli.checkpoint.modules import Layout
from qcli.loading import out_of_memory
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit

NAME = "qcli"
PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")  # companions of a weight, after the dot


class NoRoom(Exception):
    """The device map leaves modules to the disk."""


class LoadingStopped(BaseException):
    """Carries its cause past transformers, which notes down every Exception of a conversion and reads on."""


@register_quantization_config(NAME)
class QcliConfig(QuantizationConfigMixin):
    """Either `modules`, the stored scheme of each quantized module by name, or `method`, to quantize with while reading."""

    def __init__(self, modules=None, compute_dtype: str = "auto", threshold: float = 6.0, method: str | None = None, **_):
        self.quant_method = NAME
        self.modules, self.compute_dtype, self.threshold, self.method = modules, compute_dtype, threshold, method


@register_quantizer(NAME)
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
        # transformers 5.17 casts what it reads to the dtype it finds here, and only then quantizes.
        tensors["weight"] = torch.empty(tensors["weight"].shape, dtype=dtype, device="meta")
        with torch.device("meta"):
            module = self._module(old, spec, tensors, compute)
        module.quantize_with = (method, code, isinstance(old, Conv1D))
        return module

    def _module(self, old: nn.Module, spec: dict, tensors: dict, compute_dtype: torch.dtype) -> nn.Module:
        common = (spec["in_features"], spec["out_features"], getattr(old, "bias", None) is not None)
        if spec["bits"] == 8:
            return Linear8bit(*common, tensors=tensors, threshold=self.quantization_config.threshold, dtype=old.weight.dtype)
        return Linear4bit(
            *common,
            tensors=tensors,
            quant_type=spec["quant_type"],
            block_size=spec["block_size"],
            nested_offset=spec["nested_offset"],
            compute_dtype=compute_dtype,
            dtype=old.weight.dtype,
        )

    def get_weight_conversions(self):
        if not self.pre_quantized:
            return []
        renamings = [WeightRenaming(f"weight.{part}$", f"weight_{part}") for part in PARTS_4BIT]
        states = [f"weight.quant_state.bitsandbytes__{name}$" for name in ("nf4", "fp4")]
        return renamings + [WeightRenaming(state, "weight_quant_state") for state in states]

    def validate_environment(self, *_, device_map=None, **__):
        """Called with what was asked for, and again once each module has its device."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise NoRoom

    def param_element_size(self, model, param_name: str, param: torch.Tensor) -> float:
        """Bytes, for device maps: a weight that is yet to be quantized has its final shape, but not its final dtype."""
        return 1 if self.param_needs_quantization(model, param_name) else param.element_size()

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
        try:
            return _quantized(input_dict, model)
        except out_of_memory.KINDS as e:
            if not out_of_memory.is_one(e):
                raise
            raise LoadingStopped from e


def _quantized(input_dict: dict, model) -> dict[str, torch.Tensor]:
    """The tensors of a module, of its one weight."""
    ((name, value),) = input_dict.items()
    value = value[0] if isinstance(value, list) else value
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    method, code, transposed = module.quantize_with
    if transposed:
        value = value.t().contiguous()
    stream = method.stream("weight", module.out_features, module.in_features, code, value.device)
    weight = _fed(stream, value, method.granularity(module.in_features), module.weight.shape)
    tensors = {"weight": weight} | stream.finish().tensors
    if method.bits == 4:
        module.nested_offset = stream.nested_offset
    return {f"{path}.{_attribute(key)}": tensor.to(value.device) for key, tensor in tensors.items()}


def _fed(stream, value: torch.Tensor, grain: int, shape: torch.Size) -> torch.Tensor:
    """What the stream makes of `value`, in place at once: never twice in memory."""
    flat = value.reshape(-1)
    step = max((1 << 21) // grain, 1) * grain
    made, filled = None, 0
    for i, chunk in enumerate(flat.split(step)):
        for _, _, piece in stream.feed(chunk, i * step):
            if made is None:
                made = torch.empty(shape, dtype=piece.dtype, device=piece.device)
            made.view(-1)[filled : filled + piece.numel()] = piece.reshape(-1)
            filled += piece.numel()
    return made
