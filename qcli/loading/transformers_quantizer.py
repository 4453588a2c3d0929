"""The quantizer that qcli registers with transformers: it puts our modules in place of linear ones before weights load.

Control comes here from inside `from_pretrained`: to `_process_model_before_weight_loading` once the model
stands on the meta device, and to `_Quantize.convert` for each weight that is quantized as it is read.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcli import formats
from qcli.checkpoint import dtypes
from qcli.checkpoint.modules import Layout
from qcli.formats import Stored, Weight
from qcli.loading import out_of_memory
from qcli.methods.choosing import made, methods_of
from qcli.nn import module_for
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.recipe import Recipe

NAME = "qcli"


class NoRoom(Exception):
    """The device map leaves modules to the disk."""


class LoadingStopped(BaseException):
    """Carries its cause past transformers, which notes down every Exception of a conversion and reads on."""


class Modules(dict[str, Stored]):
    """What is stored of each module. transformers copies a config, all the way down, several times while it loads; this one, which
    nobody changes, stays itself: hundreds of descriptions take a tenth of a second a copy."""

    def __deepcopy__(self, memo: dict) -> "Modules":
        return self


@register_quantization_config(NAME)
class QcliConfig(QuantizationConfigMixin):
    """Either `modules`, what is stored of each quantized module by its name, or `recipe`, to quantize by while reading.

    `compute_dtype` is a torch name, or None for what is stored.
    """

    def __init__(
        self, modules: Mapping[str, Stored] | None = None, recipe: Recipe | None = None, compute_dtype: str | None = None, **_
    ):
        self.quant_method = NAME
        self.modules = None if modules is None else Modules(modules)
        self.recipe, self.compute_dtype = recipe, compute_dtype

    def to_dict(self) -> dict:
        """As JSON values, for messages of transformers: of each module the name of its scheme."""
        modules = {name: stored.scheme.name for name, stored in (self.modules or {}).items()}
        recipe = self.recipe.summary() if self.recipe else None
        return {"quant_method": NAME, "modules": modules, "recipe": recipe, "compute_dtype": self.compute_dtype}


@register_quantizer(NAME)
class QcliQuantizer(HfQuantizer):
    """Puts modules of qcli.nn in place of linear ones before transformers loads the weights."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        config = self.quantization_config
        if self.pre_quantized:
            for name, stored in config.modules.items():
                old = model.get_submodule(name)
                named = config.compute_dtype or stored.compute_dtype
                compute = getattr(torch, named) if named else model.dtype
                model.set_submodule(name, _module(old, stored, _meta(stored), compute))
            return model
        skip = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        layout = Layout("", default_skip=skip)
        format = formats.holding([each.scheme for each in methods_of(config.recipe)], config.recipe.format)
        for name, module in list(model.named_modules()):
            is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
            choice = config.recipe.choice(name)
            if is_linear and not choice.keeps and not layout.skipped(name, None):
                model.set_submodule(name, _unfilled(module, made(choice), format, model.dtype))
        return model

    def get_weight_conversions(self):
        if not self.pre_quantized:
            return []
        used = {stored.format for stored in self.quantization_config.modules.values()}
        return [WeightRenaming(old, new) for name in sorted(used) for old, new in formats.get(name).renamings()]

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


class _Quantize(ConversionOps):
    """Quantizes one weight between the file and the module."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        try:
            return _quantized(input_dict, model)
        except out_of_memory.KINDS as e:
            if not out_of_memory.is_out_of_memory(e):
                raise
            raise LoadingStopped from e


def _meta(stored: Stored) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=dtypes.torch_dtype(code), device="meta") for name, (code, shape) in stored.tensors.items()
    }


def _module(old: nn.Module, stored: Stored, tensors: dict[str, torch.Tensor], compute_dtype: torch.dtype) -> QuantizedLinear:
    bias = getattr(old, "bias", None) is not None
    with torch.device("meta"):
        return module_for(stored, tensors, bias=bias, dtype=old.weight.dtype, compute_dtype=compute_dtype)


def _unfilled(old: nn.Module, method, format: formats.Format, dtype: torch.dtype) -> QuantizedLinear:
    """The module for `old` quantized by `method`, whose weight is quantized once it is read."""
    out_features, in_features = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
    weight = Weight("weight", out_features, in_features, dtypes.CODES[str(dtype).removeprefix("torch.")])
    specs = filter(format.in_module, format.tensors(weight, method.scheme))
    tensors = {format.attribute(spec.name): (spec.dtype, spec.shape) for spec in specs}
    stored = Stored(format.name, method.scheme, out_features, in_features, tensors)
    empty = _meta(stored)
    # transformers 5.17 casts what it reads to the dtype it finds here, and only then quantizes.
    empty["weight"] = torch.empty(empty["weight"].shape, dtype=dtype, device="meta")
    module = _module(old, stored, empty, torch.bfloat16 if dtype == torch.float32 else dtype)
    module.quantize_with = (method, format, weight, isinstance(old, Conv1D))
    return module


def _quantized(input_dict: dict, model) -> dict[str, torch.Tensor]:
    """The tensors of a module, of its one weight."""
    ((name, value),) = input_dict.items()
    value = value[0] if isinstance(value, list) else value
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    method, format, weight, transposed = module.quantize_with
    if transposed:
        value = value.t().contiguous()
    specs = {spec.name: spec for spec in format.tensors(weight, method.scheme) if format.in_module(spec)}
    # Filled in place at once: never twice in memory.
    made = {name: torch.empty(spec.nbytes, dtype=torch.uint8, device=value.device) for name, spec in specs.items()}
    encoder = method.encoder(module.out_features, module.in_features, value.device)
    step = max((1 << 21) // encoder.grain, 1) * encoder.grain

    def pack(parts: dict[str, torch.Tensor], start: int) -> None:
        for target, offset, piece in format.pack(weight, method.scheme, parts, start):
            if target not in made:  # a table, or the description of the others
                continue
            raw = piece.contiguous().reshape(-1).view(torch.uint8)
            made[target][offset : offset + raw.numel()] = raw.to(value.device)

    for i, chunk in enumerate(value.reshape(-1).split(step)):
        pack(encoder.feed(chunk, i * step), i * step)
    parts, _ = encoder.finish()
    pack(parts, 0)
    if "nested_offset" in parts:
        module.nested_offset = float(parts["nested_offset"])
    return {
        f"{path}.{format.attribute(target)}": raw.view(dtypes.torch_dtype(specs[target].dtype)).view(specs[target].shape)
        for target, raw in made.items()
    }
