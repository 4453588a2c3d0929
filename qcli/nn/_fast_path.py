"""A quantized module's way around its op, for the few tokens of a decoding step.

A decoding step is made of such calls, each on caches that the weights have just filled. The way through the op and its checks
was measured at 7% of a step on a CPU. So the module keeps its CPU kernel's view of the weight, with the addresses of the tensors
that the view was made from, and calls the kernel itself. Whatever may replace a tensor drops the view.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import nn

from qcli.runtime import cpu


class FastPath(nn.Module):
    """For a module with `in_features`, whose `_op(x, *_arguments())` is its output and `_prepare` makes the kernel's view."""

    _op: Callable[..., torch.Tensor]
    _prepare: Callable  # of in_features and _few_arguments()
    _prepared = None  # (addresses of the tensors, the CPU kernel's view of them)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        few = self._prepare.MOST_TOKENS * self.in_features
        if not cpu.plain(x) or not 0 < x.numel() <= few or x.shape[-1] != self.in_features:
            return self._op(x, *self._arguments())
        tensors = chain(self._parameters.values(), self._buffers.values())
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        kept = self._prepared
        if kept is None or kept[0] != addresses:  # a tensor may have been replaced
            kept = addresses, self.kernel_view()
            # A view that holds copies is not kept: changes in place would not reach it. Nor is one of a module whose weight
            # accelerate brings and takes away again: the view would keep it alive.
            if kept[1].addresses <= set(addresses) and "_hf_hook" not in self.__dict__:
                self.__dict__["_prepared"] = kept
        return kept[1](x)

    def for_few_tokens(self):
        """What computes the module's output for few tokens on a CPU. Raises ValueError or TypeError for tensors that the kernel
        refuses, and where it would compute something else."""
        return self.kernel_view()

    def kernel_view(self):
        """The CPU kernel's view of the weight."""
        return self._prepare(self.in_features, *self._few_arguments())

    def _few_arguments(self) -> tuple:
        return self._arguments()

    def _arguments(self) -> tuple:
        """What the op takes beside x, in its order."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__.pop("_prepared", None)
        super().__setattr__(name, value)

    def _apply(self, *arguments, **options):
        self.__dict__.pop("_prepared", None)  # the view keeps its tensors alive
        return super()._apply(*arguments, **options)

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_prepared"}  # addresses mean nothing there
