"""A step of one token as few ops over tensors: what a CUDA graph records in place of transformers' many small kernels (graph.py).

A layer of Llama is 12 launches so: two norms that also add to the residual stream, seven products, the rotation with the append to
the cache, attention, and the gated activation. transformers takes about forty. The readings of the layers are those of the lean
step, and they are compared with transformers in the same way, on a text of random tokens. The residual stream is float32;
everything else is in the model's dtype.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcli.errors import KernelError
from qcli.generation.lean import CHOICE
from qcli.generation.lean_step import Added, LayerCache, laid_out
from qcli.generation.linears import hooked
from qcli.generation.recognized import Recognized
from qcli.generation.step import Unsupported
from qcli.generation.structure import Attention, Block, Mlp, Norm
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.ops.activate import activate
from qcli.ops.attend import attend
from qcli.ops.norm import norm
from qcli.ops.rope_append import rope_append


@dataclass(frozen=True)
class Projection:
    """A linear layer as the readings take it: its sizes, and the call of the module itself."""

    module: nn.Module
    in_features: int
    out_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def projection_of(module: nn.Module) -> Projection:
    """Raises Unsupported for anything that computes more than a linear layer and an adapter of it."""
    if hooked(module):
        raise Unsupported
    if isinstance(module, Conv1D):
        return Projection(module, *module.weight.shape)
    if type(module) is not nn.Linear and not isinstance(module, QuantizedLinear):
        raise Unsupported
    return Projection(module, module.in_features, module.out_features)


def op_step(model) -> "OpStep | None":
    """The step of `model`; None where its layers are not recognised, compute something else, or QCLI_STEP is transformers; and for
    an unquantized model on a GPU, which needs no kernel of ours."""
    quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if os.environ.get(CHOICE) == "transformers" or not (quantized or model.device.type == "cpu"):
        return None
    try:
        return OpStep(model)
    except (Unsupported, KernelError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


class OpStep(Recognized):
    """The layers of one model as ops, for the caches of step.py. Raises Unsupported where they differ from transformers'."""

    def __init__(self, model):
        super().__init__(model, projection_of)
        device, text = model.device, self.random_text().to(model.device)
        caches = self.caches(text.shape[1], self.dtype)
        with torch.inference_mode():
            with self.watching() as seen:
                expected = self.read(text, caches)
            blocks = self.agreeing(seen, text, caches, run_layer)
            self.blocks = [_on(device, block) for block in blocks]
            self.norm = _on(device, self.last_norm())
            logits = self._logits(seen.outputs[-1][0, -1:].float(), Added([]))
        if not self.tolerance.agree(logits, expected):
            raise Unsupported

    def laid_out(self, length: int) -> list:
        """The tables of all layers for texts of up to `length` tokens."""
        known: dict = {}
        return [laid_out(table, block.attention.rope, known) for table, block in zip(self.tables(length), self.blocks)]

    def empty_keys(self) -> list[torch.Tensor]:
        """Keys of no position [1, kv_heads, 0, head_dim] of each layer, as the caches of step.py begin."""
        attention = [block.attention for block in self.blocks]
        return [torch.empty(1, a.kv_heads, 0, a.head_dim, dtype=self.dtype, device=self.model.device) for a in attention]

    def logits(self, ids: torch.Tensor, start: torch.Tensor, layers: Sequence, tables: list) -> torch.Tensor:
        """Logits float32 [1, vocabulary] after ids int64 [1], at the position `start`, int64 [] on the device.

        `layers` have keys and values [1, kv_heads, span, head_dim] each. `tables` are those of `laid_out`.
        """
        hidden, before = self.embed(ids, start).float(), Added([])
        for block, window, layer, table in zip(self.blocks, self.windows, layers, tables):
            cache = layer.keys[0], layer.values[0]
            hidden, before, _ = _layer(block, window, table, hidden, before, cache, start, self.dtype)
        return self._logits(hidden, before)

    def _logits(self, hidden: torch.Tensor, before: Added) -> torch.Tensor:
        _, read = _add_and_norm(hidden, before, self.norm, self.dtype)
        return self.finished(self.head(read).float())


def run_layer(
    block: Block, cache: LayerCache, window: int, table, x: torch.Tensor, start: int, attention_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As lean_step.run_layer, by ops."""
    block, where = _on(x.device, block), torch.tensor(start, device=x.device)
    table, stored = laid_out(table, block.attention.rope, {}), (cache.keys, cache.values)
    hidden, after, attended = _layer(block, window, table, x, Added([]), stored, where, cache.keys.dtype, attention_only)
    if attention_only:
        return attended.float(), None
    return attended.float(), hidden + after.factor * sum(tensor.float() for tensor in after.tensors)


def _layer(
    block: Block,
    window: int,
    table,
    hidden: torch.Tensor,
    before: Added,
    cache: tuple,
    start: torch.Tensor,
    dtype: torch.dtype,
    attention_only: bool = False,
) -> tuple[torch.Tensor, Added, torch.Tensor]:
    """hidden float32 [tokens, hidden_size] with `before` added, what this layer leaves to be added, and what attention yields."""
    hidden, read = _add_and_norm(hidden, before, block.attention_in, dtype)
    attended = _normed(_attention(block.attention, window, table, read, cache, start), block.attention_out)
    if attention_only:
        return hidden, Added([attended]), attended
    if block.parallel:
        if block.mlp_in is not None:
            _, read = _add_and_norm(hidden, Added([]), block.mlp_in, dtype)
        after = [attended, _normed(_mlp(block.mlp, read), block.mlp_out)]
    else:
        hidden, read = _add_and_norm(hidden, Added([attended], block.factor), block.mlp_in, dtype)
        after = [_normed(_mlp(block.mlp, read), block.mlp_out)]
    return hidden, Added(after, block.factor), attended


def _add_and_norm(hidden: torch.Tensor, added: Added, how: Norm | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with what is to be added, float32, and its norm in `dtype`."""
    for x in added.tensors[:-1]:
        hidden = hidden + added.factor * x.float()
    if how is None:
        if added.tensors:
            hidden = hidden + added.factor * added.tensors[-1].float()
        return hidden, hidden.to(dtype)
    if not added.tensors:
        return hidden, norm(hidden, None, how.weight, how.bias, how.eps, how.centered)[0].to(dtype)
    read, total = norm(added.tensors[-1], hidden, how.weight, how.bias, how.eps, how.centered, added.factor)
    return total, read


def _normed(x: torch.Tensor, how: Norm | None) -> torch.Tensor:
    return x if how is None else norm(x, None, how.weight, how.bias, how.eps, how.centered)[0]


def _attention(a: Attention, window: int, table, x: torch.Tensor, cache: tuple, start: torch.Tensor) -> torch.Tensor:
    tokens, (keys, values) = len(x), cache
    made = {name: projection(x) for name, projection in a.projections.items()}
    heads = {"q": a.heads, "k": a.kv_heads, "v": a.kv_heads}
    if a.by_head:
        parts = made["qkv"].view(tokens, a.heads, 3, a.head_dim).unbind(2)
        made = {name: part.reshape(tokens, -1) for name, part in zip("qkv", parts)}
    elif "qkv" in made:
        made = dict(zip("qkv", made["qkv"].split([count * a.head_dim for count in heads.values()], 1)))
    for name, how in (("q", a.q_norm), ("k", a.k_norm)):
        if how is not None:
            shape = (heads[name], a.head_dim) if a.norm_per_head else (heads[name] * a.head_dim,)
            made[name] = _normed(made[name].unflatten(1, shape), how).flatten(1)
    q, k, v = (made[name].unflatten(1, (heads[name], a.head_dim)) for name in "qkv")
    cos, sin = table or (None, None)
    rope_append(q, k, v, cos, sin, keys, values, None, None, start, a.rope not in ("halves", None))
    return a.out(attend(q, keys, values, None, None, None, start, a.scale, a.softcap, window).flatten(1))


def _mlp(m: Mlp, x: torch.Tensor) -> torch.Tensor:
    made = {name: projection(x) for name, projection in m.projections.items()}
    if "gate_up" in made:
        made = dict(zip(("gate", "up"), made["gate_up"].split(m.width, 1)))
    return m.down(activate(made["gate"], made.get("up"), m.act))


def _on(device: torch.device, part):
    """A part of a reading with the weights of its norms on `device`."""
    if isinstance(part, Norm):
        weight, bias = (None if x is None else x.to(device) for x in (part.weight, part.bias))
        return replace(part, weight=weight, bias=bias)
    if isinstance(part, (Block, Attention)):
        inner = {f.name: getattr(part, f.name) for f in fields(part)}
        return replace(part, **{name: _on(device, x) for name, x in inner.items() if isinstance(x, (Norm, Attention))})
    return part
