"""One model under one method: what it needs for a setting, block by block, and the components of that with their formulas."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcli.memory.activations import activations
from qcli.memory.blocks import blocks_of
from qcli.memory.cache import Cache, cache
from qcli.memory.opening import Model
from qcli.memory.split import STACK_PREFIX
from qcli.memory.verdict import Needs
from qcli.memory.weights import ITEMSIZE, weights
from qcli.sizes import format_bytes


@dataclass(frozen=True)
class Setting:
    """What the model is to do: `batch` sequences of `context` tokens, run by `runtime`, or trained by `train` ("qlora", "lora",
    None) with adapters of `rank`. `dtype` is that of all that is not quantized; `kv_dtype` the cache's, None for the same."""

    context: int
    batch: int
    dtype: str
    kv_dtype: str | None
    runtime: str
    train: str | None
    rank: int


@dataclass(frozen=True)
class Component:
    """Bytes of one part of the whole, and the sentences that lead to them."""

    name: str
    bytes: int
    formula: Sequence[str]


STORED = "stored"  # the method of a checkpoint that is quantized already


class Costs:
    """`model` under `method`. What does not depend on the setting is counted once."""

    def __init__(self, model: Model, method: str, dtype: str):
        self.model, self.method = model, method
        self.dtype = method if method in ITEMSIZE else dtype  # of activations, keys and values
        self.weights = weights(model.parameters, method, dtype)
        self.blocks = blocks_of(model, method, dtype)
        self.computes_as = _stored_method(model, dtype) if method == STORED else method

    def needs(self, setting: Setting) -> Needs:
        """What has to find room on the GPUs."""
        return self.counted(setting)[0]

    def counted(self, setting: Setting) -> tuple[Needs, list[Component]]:
        """What has to find room, and its parts, which sum to it but for the overhead."""
        kept = cache(
            self.model.config, setting.context, setting.batch, setting.kv_dtype or self.dtype, setting.runtime
        )
        working = self._working(setting, kept)
        blocks, layer = [], 0
        for block in self.blocks:
            if block.name.startswith(STACK_PREFIX):
                block, layer = replace(block, state=kept.by_layer[layer]), layer + 1
            blocks.append(block)
        needs = Needs(blocks, working.bytes, (2 * 10**8, 10**9))
        parts = [
            Component("weights", needs.weights, self.weights.formula),
            Component("KV cache", kept.total, kept.formula),
            working,
        ]
        return needs, parts

    def _working(self, setting: Setting, kept: Cache) -> Component:
        """The largest of three moments: the whole context is read as a prompt, a step is made at its end, or the largest weight
        is read to be quantized."""
        found = activations(
            self.model.config, setting.context, setting.batch, method=self.computes_as, dtype=self.dtype,
            runtime=setting.runtime,
        )  # fmt: skip
        moments = {
            f"prompt of {setting.context:,} tokens, at its {found.binding}": found.prefill + kept.prompt_extra,
            f"step at {setting.context:,} tokens": found.decode + kept.append,
            "loading, the largest tensor whole in the model's dtype": self.weights.largest,
        }
        sentences = [f"{name}: {format_bytes(size)}" for name, size in moments.items()]
        return Component("activations", max(moments.values()), [*sentences, *found.formula])


def _stored_method(model: Model, dtype: str) -> str:
    """The method whose products a stored checkpoint makes; those that are not bitsandbytes' are taken for 16-bit ones."""
    schemes = {parameter.scheme for parameter in model.parameters}
    return next((method for method in ("nf4", "fp4", "llm-int8") if method in schemes), dtype)
