"""The quantizer that qcli registers with transformers: it puts our modules in place of linear ones before weights load.

Control comes here from inside `from_pretrained`: to `_process_model_before_weight_loading` once the model
stands on the meta device, and to `_Quantize.convert` for each weight that is quantized as it is read.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcli import formats
from qcli.checkpoint import dtypes
from qcli.checkpoint.layout import Layout, OutputHead
from qcli.checkpoint.modules import lookup_scale
from qcli.formats import Stored, Weight
from qcli.loading import out_of_memory
from qcli.loading.dequantizing import dequantize_modules
from qcli.methods.choosing import made, methods_of
from qcli.methods.simulate import absmax_of
from qcli.nn import module_for
from qcli.nn.quantized_embedding import QuantizedEmbedding
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.recipe import Recipe

NAME = "qcli-modules"  # not that of a format on disk: what is registered here needs more than a config.json says


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

    `head` is the model's head, for one that is quantized. `compute_dtype` is a torch name, or None for what is stored.
    """

    def __init__(
        self,
        modules: Mapping[str, Stored] | None = None,
        recipe: Recipe | None = None,
        compute_dtype: str | None = None,
        head: OutputHead | None = None,
        **_,
    ):
        self.quant_method = NAME
        self.modules = None if modules is None else Modules(modules)
        self.recipe, self.compute_dtype, self.head = recipe, compute_dtype, head

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
                named = config.compute_dtype or stored.compute_dtype
                compute = getattr(torch, named) if named else model.dtype
                self._put(model, name, partial(_stored_module, stored=stored, compute_dtype=compute))
        else:
            self._put_unfilled(model)
        self._keep_activations_of_head(model)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        for module in model.modules():
            linear = _linear(module)
            # accelerate brings weights that it keeps elsewhere for each call alone: those stay as they are stored.
            if isinstance(linear, QuantizedLinear) and not linear.weight.is_meta:
                linear.arrange()
        return model

    def _keep_activations_of_head(self, model) -> None:
        """A head reads one token a step, so that rounding its activations saves nothing. One that is bitsandbytes' own, among other
        modules that round theirs, does as they do."""
        known = self.quantization_config.head
        head = None if known is None else model.get_submodule(known.module)
        if isinstance(head, QuantizedLinear) and head.rounds_activations:
            others = (m.rounds_activations for m in model.modules() if isinstance(m, QuantizedLinear) and m is not head)
            if known.tied or not any(others):
                head.rounds_activations = False

    def _put_unfilled(self, model) -> None:
        recipe, head = self.quantization_config.recipe, self.quantization_config.head
        skip = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        layout = Layout("", default_skip=skip)
        format = formats.holding([each.scheme for each in methods_of(recipe)], recipe.format)
        for name, module in list(model.named_modules()):
            is_linear = type(module) is nn.Linear or isinstance(module, Conv1D)
            choice = recipe.choice(name)
            if is_linear and not choice.keeps and not layout.skipped(name, None):
                _place(model, name, _unfilled(module, made(choice), format, model.dtype))
        if recipe.head is not None:
            method = made(recipe.head)
            of_head = formats.holding([method.scheme])
            self._put(model, head.linear.module, partial(_unfilled, method=method, format=of_head, dtype=model.dtype))

    def _put(self, model, name: str, make: Callable[[nn.Module], QuantizedLinear]) -> None:
        """Puts what `make` makes in the place of the module `name`. If that is a head or an embedding that are tied, the other one
        gets a module too, and transformers is told to tie all tensors of the two."""
        head, old = self.quantization_config.head, model.get_submodule(name)
        made = make(old)
        _place(model, name, made)
        if head is None or not head.tied or name != head.linear.module:
            return
        other = made if made.replaces_tensors else make(old)
        _place(model, head.embedding if name == head.module else head.module, other)
        for attribute, tensor in list(made._buffers.items()):
            if tensor is not None:
                model.all_tied_weights_keys[f"{head.module}.{attribute}"] = f"{head.embedding}.{attribute}"
                for each in {id(linear): linear for linear in (made, other)}.values():  # transformers ties parameters alone
                    del each._buffers[attribute]
                    each.register_parameter(attribute, nn.Parameter(tensor, requires_grad=False))
        # Once the weight is quantized, this is the one thing that is no tensor.
        if other is not made:
            made.__dict__["twin"] = other

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
        return name == "weight" and is_quantized_as_read(model, path)

    def get_quantize_ops(self):
        return _Quantize()

    def is_serializable(self) -> bool:
        """What is loaded is on disk already, or made by `qcli quantize`."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters may be trained on what is loaded. Its own weights stay as they are."""
        return True

    def _dequantize(self, model, dtype=None):
        dequantize_modules(model, dtype, self.quantization_config.head)
        return model


class _Quantize(ConversionOps):
    """Quantizes one weight between the file and the module."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        try:
            return _quantized(input_dict, model)
        except out_of_memory.KINDS as e:
            if not out_of_memory.is_out_of_memory(e):
                raise
            raise LoadingStopped from e


def _place(model, name: str, linear: QuantizedLinear) -> None:
    """Puts `linear` in the place of the linear module or of the embedding `name`."""
    old, new = model.get_submodule(name), linear
    if isinstance(old, nn.Embedding):
        new = QuantizedEmbedding(linear, old.weight.dtype, lookup_scale(old, old.weight.dtype))
    new.__dict__["replaced"] = old  # empty; for `dequantize`
    model.set_submodule(name, new)


def is_quantized_as_read(model, name: str) -> bool:
    """Whether the weight of the module `name` is quantized between the file and the module."""
    return hasattr(_linear(model.get_submodule(name)), "quantize_with")


def _linear(module: nn.Module) -> nn.Module:
    """The module itself; of an embedding the one that has its weight."""
    return module.linear if isinstance(module, QuantizedEmbedding) else module


def _meta(stored: Stored) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shape, dtype=dtypes.torch_dtype(code), device="meta") for name, (code, shape) in stored.tensors.items()
    }


def _module(old: nn.Module, stored: Stored, tensors: dict[str, torch.Tensor], compute_dtype: torch.dtype) -> QuantizedLinear:
    bias = getattr(old, "bias", None) is not None
    with torch.device("meta"):
        return module_for(stored, tensors, bias=bias, dtype=old.weight.dtype, compute_dtype=compute_dtype)


def _stored_module(old: nn.Module, stored: Stored, compute_dtype: torch.dtype) -> QuantizedLinear:
    return _module(old, stored, _meta(stored), compute_dtype)


def _unfilled(old: nn.Module, method, format: formats.Format, dtype: torch.dtype) -> QuantizedLinear:
    """The module for `old` quantized by `method`, whose weight is quantized once it is read."""
    out_features, in_features = old.weight.shape[::-1] if isinstance(old, Conv1D) else old.weight.shape
    weight = Weight("weight", out_features, in_features, dtypes.CODES[str(dtype).removeprefix("torch.")])
    specs = filter(format.in_module, format.tensors(weight, method.scheme))
    tensors = {format.attribute(spec.name): (spec.dtype, spec.shape) for spec in specs}
    stored = Stored(format.layout_of(method.scheme), method.scheme, out_features, in_features, tensors)
    module = _module(old, stored, _meta(stored), torch.bfloat16 if dtype == torch.float32 else dtype)
    module.quantize_with = (method, format, weight, isinstance(old, Conv1D))
    weight_as_read(module, dtype)
    return module


def weight_as_read(module: nn.Module, dtype: torch.dtype) -> None:
    """Makes the empty weight of a module that is quantized as it is read one of `dtype`: transformers 5.17 casts what it reads to
    the dtype that it finds there, and only then has it quantized."""
    linear = _linear(module)
    if hasattr(linear, "quantize_with"):
        linear.weight = nn.Parameter(torch.empty(linear.weight.shape, dtype=dtype, device="meta"), requires_grad=False)


def _quantized(input_dict: dict, model) -> dict[str, torch.Tensor]:
    """The tensors of a module, of its one weight."""
    ((name, value),) = input_dict.items()
    value = value[0] if isinstance(value, list) else value
    path = name.rpartition(".")[0]
    module = _linear(model.get_submodule(path))
    method, format, weight, transposed = module.quantize_with
    if transposed:
        value = value.t().contiguous()
    specs = {spec.name: spec for spec in format.tensors(weight, method.scheme) if format.in_module(spec)}
    # Filled in place at once: never twice in memory.
    made = {name: torch.empty(spec.nbytes, dtype=torch.uint8, device=value.device) for name, spec in specs.items()}
    absmax = absmax_of(value) if method.needs_absmax else 0.0
    encoder = method.encoder(module.out_features, module.in_features, value.device, absmax)
    grain = math.lcm(encoder.grain, format.rows_together * module.in_features) if format.rows_together > 1 else encoder.grain
    step = max((1 << 21) // grain, 1) * grain

    def pack(parts: dict[str, torch.Tensor], start: int) -> None:
        for piece in format.pack(weight, method.scheme, parts, start):
            if piece.tensor not in made:  # a table, or the description of the others
                continue
            raw, to = piece.data.contiguous().reshape(-1).view(torch.uint8).to(value.device), made[piece.tensor][piece.offset :]
            if piece.stride:
                rows = raw.view(len(piece.data), -1)
                to.as_strided(rows.shape, (piece.stride, 1)).copy_(rows)
            else:
                to[: raw.numel()] = raw

    for i, chunk in enumerate(value.reshape(-1).split(step)):
        pack(encoder.feed(chunk, i * step), i * step)
    parts, _ = encoder.finish()
    pack(parts, 0)
    if "nested_offset" in parts:
        for each in (module, getattr(module, "twin", None)):
            if each is not None:
                each.nested_offset = float(parts["nested_offset"])
    return {
        f"{path}.{format.attribute(target)}": raw.view(dtypes.torch_dtype(specs[target].dtype)).view(specs[target].shape)
        for target, raw in made.items()
    }
