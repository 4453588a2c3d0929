"""Puts plain modules back in the place of quantized ones in a loaded model: what transformers' `model.dequantize()` asks for."""

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcli.checkpoint.layout import OutputHead
from qcli.errors import UsageError
from qcli.nn.low_rank import added_to
from qcli.nn.quantized_embedding import QuantizedEmbedding
from qcli.nn.quantized_linear import QuantizedLinear


def dequantize_modules(model: nn.Module, dtype: torch.dtype, head: OutputHead | None) -> None:
    """Gives every quantized linear layer and embedding of `model` its module of before, with the weight that its codes decode to,
    in `dtype`, one after the other. Unquantized weights take that dtype where it is not the model's own. `head` is the model's head
    where it is quantized: if it is tied to the embedding, the two share a weight again.

    Raises UsageError where accelerate keeps weights elsewhere for each call.
    """
    quantized = [(name, m) for name, m in model.named_modules() if isinstance(m, (QuantizedLinear, QuantizedEmbedding))]
    if elsewhere := [name for name, module in quantized if module._parameters["weight"].is_meta]:
        raise UsageError(
            f"{elsewhere[0]} is kept elsewhere until it is called, expected all weights in the memory of their device",
            "Load the model whole, without a device map that leaves parts on the CPU or the disk.",
        )
    tied = {head.module, head.embedding} if head is not None and head.tied else set()
    shared: nn.Parameter | None = None
    for name, module in quantized:
        linear, plain = (module.linear if isinstance(module, QuantizedEmbedding) else module), module.__dict__["replaced"]
        if name not in tied or shared is None:
            weight = linear.dequantize(dtype)
            weight = nn.Parameter(weight.t().contiguous() if isinstance(plain, Conv1D) else weight, requires_grad=False)
            shared = weight if name in tied else shared
        plain.weight = shared if name in tied else weight
        if isinstance(module, QuantizedEmbedding):
            if isinstance(getattr(plain, "embed_scale", None), torch.Tensor):  # a buffer that is not stored
                plain.embed_scale = torch.tensor(plain.scalar_embed_scale, device=plain.weight.device)
        elif linear.bias is not None:
            plain.bias = linear.bias
        plain.train(module.training)
        if (added := added_to(module)) is not None:
            plain.register_forward_hook(added)
        model.set_submodule(name, plain)
        if (hook := module.__dict__.get("_hf_hook")) is not None:
            add_hook_to_module(plain, hook)
    if head is not None:
        names = {f"{head.module}.{attribute}" for attribute in model.get_submodule(head.module).state_dict()}
        ties = model.all_tied_weights_keys
        for stale in [each for each in ties if each.startswith(f"{head.module}.") and each not in names]:
            del ties[stale]
    if dtype != model.config.dtype:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
