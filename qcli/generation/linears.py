"""Linear layers as a decoding step takes them: prepared for their CPU kernels, with what an adapter adds to them."""

from dataclasses import dataclass

import torch
from torch import nn

from qcli.generation.step import Unsupported
from qcli.nn._fast_path import FastPath
from qcli.nn.low_rank import added_to
from qcli.ops.linear_float import PreparedFloat


@dataclass(frozen=True)
class Adapted:
    """A linear layer with an adapter: `base` of its input, and `up` of what `down` makes of it."""

    base: object
    down: PreparedFloat
    up: PreparedFloat

    @property
    def in_features(self) -> int:
        return self.down.in_features

    @property
    def out_features(self) -> int:
        return self.up.out_features


def hooked(module: nn.Module) -> bool:
    """Whether hooks may change what the module gets or gives, beside what an adapter adds."""
    known = int(added_to(module) is not None)
    return len(module._forward_hooks) > known or bool(module._forward_pre_hooks) or "_hf_hook" in module.__dict__


def linear_of(module: nn.Module):
    """A linear layer, prepared for the step, with what an adapter adds to it. Raises Unsupported for anything that computes more,
    or has no kernel."""
    if hooked(module):
        raise Unsupported
    base, added = _linear_of(module), added_to(module)
    return base if added is None else Adapted(base, _float(added.a, None), _float(added.b, None))


def _linear_of(module: nn.Module):
    if isinstance(module, FastPath):
        return module.for_few_tokens()
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        # Its weight is [in_features, out_features]. The same values are laid out as a linear layer's, which is as good for torch.
        if not module.weight.t().is_contiguous():
            module.weight.data = module.weight.data.t().contiguous().t()
        return _float(module.weight.t(), module.bias)
    if type(module) is not nn.Linear:
        raise Unsupported
    return _float(module.weight, module.bias)


def _float(weight: torch.Tensor, bias: torch.Tensor | None) -> PreparedFloat:
    if weight.is_meta or not weight.is_contiguous():
        raise Unsupported
    try:
        return PreparedFloat(weight.shape[1], weight.detach(), None if bias is None else bias.detach())
    except (TypeError, ValueError) as e:
        raise Unsupported from e
