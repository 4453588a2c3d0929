"""The step of a few tokens on a CPU, as one list of ops over float32 activations and a cache with room (kernels/cpu/program.cpp).

transformers' own step spends most of its time around the products of a small model: on Python, on small ops of torch, on copies of
the cache. This step computes the same from what structure.py reads in the modules. Weights stay where the modules have them.

  hidden [tokens, hidden_size] is the residual stream. What attention or an MLP adds to it is added by the norm that reads it next.
"""

from dataclasses import dataclass

import torch

from qcli.generation.linears import Adapted
from qcli.generation.step import Unsupported
from qcli.generation.structure import Block, Norm
from qcli.ops import activate, attend, norm, rope_append
from qcli.runtime import cpu
from qcli.runtime.program import Program

MOST_TOKENS = 8


@dataclass
class LayerCache:
    """Keys and values [kv_heads, capacity, head_dim] of one layer. Position p is in slot p % capacity.

    With int8 there are scales, float32 [kv_heads, capacity] each: a row is its values times its scale.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @classmethod
    def empty(cls, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device="cpu") -> "LayerCache":
        keys, values = (torch.empty(kv_heads, capacity, head_dim, dtype=dtype, device=device) for _ in range(2))
        if dtype != torch.int8:
            return cls(keys, values)
        return cls(keys, values, torch.empty(kv_heads, capacity), torch.empty(kv_heads, capacity))

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """keys and values, and their scales if there are any."""
        return [x for x in (self.keys, self.values, self.key_scales, self.value_scales) if x is not None]

    @property
    def scales(self) -> dict[str, torch.Tensor | None]:
        return {"key_scales": self.key_scales, "value_scales": self.value_scales}

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values [kv_heads, tokens, head_dim] of the first positions of a text: the last `capacity` of them."""
        first = max(0, keys.shape[1] - self.capacity)
        rows = [keys[:, first:], values[:, first:]]
        if self.key_scales is not None:
            (keys, key_scales), (values, value_scales) = (rope_append.quantized(each.float()) for each in rows)
            rows = [keys, values, key_scales, value_scales]
        slots = torch.arange(first, first + rows[0].shape[1]) % self.capacity
        for to, new in zip(self.tensors, rows):
            to[:, slots] = new.to(to.dtype)


class Caches:
    """The caches of all layers, with room for `length` positions. `windows` are the layers' sliding windows, 0 for none."""

    def __init__(
        self, kv_heads: list[int], head_dims: list[int], windows: list[int], dtype: torch.dtype, length: int, device="cpu"
    ):
        self.windows, self.dtype, self.length = windows, dtype, length
        sizes = zip(kv_heads, windows, head_dims)
        self.layers = [LayerCache.empty(heads, self._capacity(window), n, dtype, device) for heads, window, n in sizes]

    def _capacity(self, window: int) -> int:
        return min(self.length, window + MOST_TOKENS - 1) if window else self.length

    def stretched(self, length: int, used: int) -> "Caches":
        """Others with room for `length` positions, which begin with the first `used` of these. A layer that has room is shared."""
        made = Caches([], [], self.windows, self.dtype, length)
        for old, window in zip(self.layers, self.windows):
            capacity = made._capacity(window)
            heads, _, head_dim = old.keys.shape
            layer = old if capacity == old.capacity else LayerCache.empty(heads, capacity, head_dim, self.dtype)
            made.layers.append(layer)
            if layer is old:
                continue
            positions = torch.arange(max(0, used - old.capacity), used)
            for to, of in zip(layer.tensors, old.tensors):
                to[:, positions % capacity] = of[:, positions % old.capacity]
        return made


class Buffers:
    """Activations of up to MOST_TOKENS tokens, float32, shared by the layers."""

    def __init__(self):
        self._tensors: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, width: int) -> torch.Tensor:
        """[MOST_TOKENS, width]; the same tensor for the same name and width."""
        key = f"{name} {width}"
        if key not in self._tensors:
            self._tensors[key] = torch.zeros(MOST_TOKENS, width)
        return self._tensors[key]


@dataclass
class Added:
    """What was computed and not yet added to the residual stream: factor times each of the tensors."""

    tensors: list[torch.Tensor]
    factor: float = 1.0


class LayerOps:
    """The ops of one layer: (kernel, record) each. `before` is what the last layer left to be added, `after` what this one does."""

    def __init__(self, block: Block, cache: LayerCache, window: int, tables, buffers: Buffers, hidden: torch.Tensor, before: Added):
        self.ops: list[tuple[str, cpu.Record]] = []
        self.block, self.buffers, self.hidden = block, buffers, hidden
        read = add_and_norm(self.ops, hidden, before, block.attention_in, buffers)
        attended = self._attention(read, cache, window, tables)
        if block.attention_out is not None:
            self._norm(attended, block.attention_out)
        self.of_attention = len(self.ops)
        if block.parallel:
            if block.mlp_in is not None:
                read = add_and_norm(self.ops, hidden, Added([]), block.mlp_in, buffers, "second")
            self.after = Added([attended, self._mlp(read)], block.factor)
        else:
            read = add_and_norm(self.ops, hidden, Added([attended], block.factor), block.mlp_in, buffers)
            self.after = Added([self._mlp(read)], block.factor)
        if block.mlp_out is not None:
            self._norm(self.after.tensors[-1], block.mlp_out)

    def _norm(self, x: torch.Tensor, how: Norm) -> None:
        """In place."""
        made = norm.record(x, x, weight=how.weight, bias=how.bias, eps=how.eps, centered=how.centered)
        self.ops.append(("norm", made))

    def _linear(self, weight, x: torch.Tensor, name: str) -> torch.Tensor:
        y = self.buffers(name, weight.out_features)
        add_linear(self.ops, weight, x, y, self.buffers)
        return y

    def _attention(self, x: torch.Tensor, cache: LayerCache, window: int, tables) -> torch.Tensor:
        a = self.block.attention
        made = {name: self._linear(weight, x, name) for name, weight in a.projections.items()}
        shapes = {"q": (a.heads, a.head_dim), "k": (a.kv_heads, a.head_dim), "v": (a.kv_heads, a.head_dim)}
        if a.by_head:
            for i, (name, (heads, n)) in enumerate(shapes.items()):
                made[name] = self.buffers(name, heads * n)
                self.ops.append(("take_heads", cpu.Record("ppqqqq", made["qkv"], made[name], heads, 3 * n, i * n, n)))
        elif "qkv" in made:
            widths = [heads * n for heads, n in shapes.values()]
            made |= zip("qkv", made["qkv"].split(widths, 1))
        for name, how in (("q", a.q_norm), ("k", a.k_norm)):
            if how is not None:
                self._norm(made[name].unflatten(1, shapes[name]) if a.norm_per_head else made[name], how)
        q, k, v = (made[name].unflatten(1, shape) for name, shape in shapes.items())
        cos, sin = tables or (None, None)
        interleaved = a.rope not in ("halves", None)
        appended = rope_append.record(q, k, v, cos, sin, cache.keys, cache.values, interleaved=interleaved, **cache.scales)
        self.ops.append(("rope_append", appended))
        y = self.buffers("attended", a.heads * a.head_dim)
        options = {"scale": a.scale, "softcap": a.softcap, "window": window} | cache.scales
        self.ops.append(("attend", attend.record(q, cache.keys, cache.values, y.view(-1, a.heads, a.head_dim), **options)))
        return self._linear(a.out, y, "attention")

    def _mlp(self, x: torch.Tensor) -> torch.Tensor:
        m = self.block.mlp
        made = {name: self._linear(weight, x, name) for name, weight in m.projections.items()}
        if "gate_up" in made:
            made |= zip(("gate", "up"), made["gate_up"].split(m.width, 1))
        inner = self.buffers("inner", m.width)
        self.ops.append(("activate", activate.record(made["gate"], made.get("up"), inner, m.act)))
        return self._linear(m.down, inner, "mlp")


def add_linear(ops: list, weight, x: torch.Tensor, y: torch.Tensor, buffers: Buffers) -> None:
    """Appends y = x W^T + bias, for x and y float32 and contiguous. `weight` is prepared for its op, or Adapted."""
    if isinstance(weight, Adapted):
        add_linear(ops, weight.base, x, y, buffers)
        inner, more = buffers("inner of adapter", weight.down.out_features), buffers("of adapter", weight.out_features)
        add_linear(ops, weight.down, x, inner, buffers)
        add_linear(ops, weight.up, inner, more, buffers)
        ops.append(("norm", norm.record(more, None, residual=y, sum=y, eps=0.0, centered=False)))
        return
    record = cpu.Record("ppp", x, y, weight.weight.address)
    record.weight = weight  # keeps it alive
    ops.append((weight.STEP, record))


def add_and_norm(ops: list, hidden: torch.Tensor, added: Added, how: Norm | None, buffers: Buffers, name="normed") -> torch.Tensor:
    """Adds to the residual stream, and returns what is read from it next: its norm, or itself without one."""
    if how is None and not added.tensors:
        return hidden
    for x in added.tensors[:-1]:
        ops.append(("norm", norm.record(x, None, residual=hidden, sum=hidden, eps=0.0, centered=False, factor=added.factor)))
    y = None if how is None else buffers(name, hidden.shape[1])
    options = {} if how is None else {"weight": how.weight, "bias": how.bias}
    options |= {"eps": 0.0 if how is None else how.eps, "centered": how is not None and how.centered}
    if added.tensors:
        made = norm.record(added.tensors[-1], y, residual=hidden, sum=hidden, factor=added.factor, **options)
    else:
        made = norm.record(hidden, y, **options)
    ops.append(("norm", made))
    return hidden if y is None else y


def laid_out(table, rope: str | None, known: dict):
    """The tables of a layer as rope_append reads them. `known` has those that were made for other layers."""
    if rope is None or table is None:
        return None
    if rope != "interleaved by halves":
        return table
    if id(table) not in known:
        known[id(table)] = tuple(each[:, : each.shape[1] // 2].repeat_interleave(2, 1) for each in table)
    return known[id(table)]


def run_layer(
    block: Block, cache: LayerCache, window: int, table, x: torch.Tensor, start: int, attention_only: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What attention yields (after its norm, if it has one) and the layer's output, float32 [tokens, hidden_size], for x of that
    shape, whose first token has the position `start`. With `attention_only` the rest is not run, and there is no output."""
    tokens, buffers = len(x), Buffers()
    hidden = buffers("hidden", block.attention.out.out_features)
    hidden[:tokens] = x
    layer = LayerOps(block, cache, window, laid_out(table, block.attention.rope, {}), buffers, hidden, Added([]))
    Program(layer.ops[: layer.of_attention] if attention_only else layer.ops).run(tokens, start)
    attended = buffers("attention", hidden.shape[1])[:tokens]
    if attention_only:
        return attended, None
    return attended, hidden[:tokens] + layer.after.factor * sum(tensor[:tokens] for tensor in layer.after.tensors)


class LeanStep:
    """The program of all layers, the last norm and the head.

    blocks, tables ((cos, sin) float32 [positions, rot_dim], or None) and `caches` have an entry per layer. `embed` maps (ids int64
    [tokens], start) to the input of the first layer [tokens, hidden_size].
    """

    def __init__(self, embed, blocks: list[Block], last_norm: Norm | None, head, tables: list, caches: Caches):
        self.embed, self.blocks, self.last_norm, self.head = embed, blocks, last_norm, head
        self.buffers = Buffers()
        self.hidden = self.buffers("hidden", blocks[0].attention.out.out_features)
        self.logits = torch.empty(MOST_TOKENS, head.out_features)
        self.record(caches, tables)

    def record(self, caches: Caches, tables: list) -> None:
        """Makes the program for other caches. If that fails, the present ones and their program stay. Raises Unsupported."""
        before, ops, known = Added([]), [], {}
        try:
            for block, cache, window, table in zip(self.blocks, caches.layers, caches.windows, tables):
                table = laid_out(table, block.attention.rope, known)
                layer = LayerOps(block, cache, window, table, self.buffers, self.hidden, before)
                before = layer.after
                ops += layer.ops
            tail = len(ops)
            read = add_and_norm(ops, self.hidden, before, self.last_norm, self.buffers, "last")
            add_linear(ops, self.head, read, self.logits, self.buffers)
        except (TypeError, ValueError) as e:
            raise Unsupported from e
        self.caches, self.program, self.tail, self.after = caches, Program(ops), slice(tail, None), before

    def run(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits float32 [tokens, vocabulary] after each of ids int64 [tokens], the first of which has the position `start`.

        The logits are overwritten by the next run.
        """
        tokens = len(ids)
        self.hidden[:tokens] = self.embed(ids, start)
        self.program.run(tokens, start)
        return self.logits[:tokens]

    def run_head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits for x [tokens, hidden_size], the output of the last layer."""
        tokens = len(x)
        self.hidden[:tokens] = x
        for tensor in self.after.tensors:
            tensor.zero_()
        self.program.run(tokens, 0, self.tail)
        return self.logits[:tokens]
