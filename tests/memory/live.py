"""How much memory the tensors of a forward or backward pass take while it runs, on no device at all."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Within it, `now` is the bytes of all storages that are alive and `peak` the most there have been; those in `known`
    aside. Tensors may be on the meta device."""

    def __init__(self, known):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key) -> None:
        self.now -= self._sizes.pop(key, 0)


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel does it: nothing but the output is made, laid out by tokens."""

    @staticmethod
    def forward(ctx, query, key, value):
        b, h, s, _ = query.shape
        out = query.new_empty(b, s, h, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def fused_attention(query, key, value, attn_mask=None, **_):
    """scaled_dot_product_attention on CUDA, by what it allocates: a mask of bools is copied in the dtype of the query."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = query.new_empty(attn_mask.shape)
    return _Fused.apply(query, key, value)
