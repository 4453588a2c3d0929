"""Puts a LoRA adapter on a model, in memory or streamed: each adapted module then adds what the adapter says to its output."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from qcli.loading.adapter import Adapter
from qcli.loading.tokenizer import read_tokenizer
from qcli.nn.low_rank import LowRank
from qcli.nn.quantized_linear import QuantizedLinear


def attach(model: nn.Module, adapter: Adapter, label: str) -> None:
    """Adds `adapter` to a transformers model, once, on any device. Its linear modules may be quantized, or empty until they are
    read. The matrices take the model's dtype. `label` names the model.

    Raises CheckpointError where the two do not fit, NonFiniteError for NaN or infinity in the adapter.
    """
    modules = dict(model.named_modules())
    adapter.check_fits({name: shape for name, module in modules.items() if (shape := _shape(module))}, label)
    for name in adapter.pairs:
        b, a = (matrix.to(model.dtype) for matrix in adapter.matrices(name))
        modules[name].register_forward_hook(LowRank(a, b))


def _shape(module: nn.Module) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear module, None for any other."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return out_features, in_features
    if isinstance(module, (nn.Linear, QuantizedLinear)):
        return module.out_features, module.in_features
    return None


def adapters_tokenizer(adapter: Adapter, base, trust_remote_code: bool, config):
    """The tokenizer beside an adapter, or `base`, the model's own, where it has none. Without a chat template it has the base's.

    `config` is the model's transformers config. Raises CheckpointError, HubError.
    """
    for name in adapter.tokenizer_files:
        adapter.place.local(name)
    found = read_tokenizer(adapter, trust_remote_code, config)
    if found is None:
        return base
    if base is not None and getattr(found, "chat_template", None) is None:
        found.chat_template = getattr(base, "chat_template", None)
    return found
