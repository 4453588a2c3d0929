"""One model under one method: what it needs for a setting, block by block, and each component with its formula."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qcli.memory.costs.activations import activations
from qcli.memory.costs.cache import cache
from qcli.memory.costs.overhead import overhead
from qcli.memory.costs.training import training
from qcli.memory.costs.weights import ITEMSIZE, weights
from qcli.memory.model.opening import Model
from qcli.memory.placing.blocks import blocks_of
from qcli.memory.placing.hardware import Gpu
from qcli.memory.placing.split import STACK_PREFIX
from qcli.memory.placing.verdict import Needs
from qcli.schemes import QUANTIZED
from qcli.sizes import format_bytes

STORED = "stored"  # the method of a checkpoint that is already quantized
_OPTIMIZED = ("adapters", "gradients of adapters", "AdamW's moments")
_PASSING = ("logits or one layer", "one weight expanded")  # transient in training: gone before the next step
_CASTS = "float32 casts"


@dataclass(frozen=True)
class Setting:
    """What the model is to do.

    `batch` sequences of `context` tokens are run by `runtime`, or train adapters of `rank` by `train` (qlora, lora or finetune).
    `dtype` is the dtype of all that is not quantized. `kv_dtype` is the cache's; None means the same. `head` is the bits of the
    output head under a method that quantizes.
    """

    context: int
    batch: int
    dtype: str
    kv_dtype: str | None
    runtime: str
    train: str | None
    rank: int
    head: int = 16


@dataclass(frozen=True)
class Component:
    """Bytes of one part of the whole, and the sentences that explain them."""

    name: str
    bytes: int
    formula: Sequence[str]


@dataclass(frozen=True)
class Counted:
    """`components` sum to `needs` without its overhead. `overhead` has the sentences on the overhead."""

    needs: Needs
    components: list[Component]
    overhead: Sequence[str]


class Costs:
    """`model` under `method`, one of METHODS in qcli.memory.costs.weights; the rest is in `dtype`.

    What is the same in every setting is counted once, here.
    """

    def __init__(self, model: Model, method: str, dtype: str):
        self.model, self.method = model, method
        self.dtype = method if method in ITEMSIZE else dtype  # of activations, keys and values
        self.weights = weights(model.parameters, method, dtype)
        self.blocks = blocks_of(model, method, dtype)
        self.computes_as = _stored_method(model, self.dtype) if method == STORED else method
        self.linears = [(p.out_features, p.in_features) for p in model.parameters if p.linear and p.numel]

    def needs(self, setting: Setting, gpus: Sequence[Gpu]) -> Needs:
        """What must fit on `gpus`."""
        return self.counted(setting, gpus).needs

    def counted(self, setting: Setting, gpus: Sequence[Gpu]) -> Counted:
        """What must fit on `gpus`, and its parts. An empty list stands for one GPU."""
        states, passing, parts = self._training(setting) if setting.train else self._inference(setting)
        blocks = [replace(block, state=state) for block, state in zip(self.blocks, states)]
        share = max(1, len(gpus))
        beside = overhead(
            self.weights.total // share, passing + sum(states) // share, setting.runtime, hopper=any(gpu.is_hopper for gpu in gpus)
        )
        needs = Needs(blocks, passing, (beside.low, beside.likely, beside.high))
        return Counted(needs, [Component("weights", needs.weights, self.weights.formula), *parts], beside.formula)

    def _inference(self, setting: Setting) -> tuple[list[int], int, list[Component]]:
        """Cache by block, transient bytes, and both as components.

        The transient bytes are the most of three moments: the whole context is read as a prompt, one token is made at its end, or
        the largest weight is read to be quantized.
        """
        config, context, batch = self.model.config, setting.context, setting.batch
        kept = cache(config, context, batch, setting.kv_dtype or self.dtype, setting.runtime)
        found = activations(config, context, batch, method=self.computes_as, dtype=self.dtype, runtime=setting.runtime)
        moments = {
            f"a prompt of {context:,} tokens, at its {found.binding}": found.prefill + kept.prompt_extra,
            f"a step at {context:,} tokens": found.decode + kept.append,
            "loading, the largest tensor whole": self.weights.largest,
        }
        passing = max(moments.values())
        sentences = [f"{name}: {format_bytes(size)}" for name, size in moments.items()]
        if kept.prompt_extra:
            beyond = format_bytes(kept.prompt_extra)
            sentences.insert(1, f"in it {beyond} of keys and values beyond the windows, held until the first step after")
        parts = [Component("cache", kept.total, kept.formula), Component("activations", passing, [*sentences, *found.formula])]
        return self._by_layer(kept.by_layer), passing, parts

    def _training(self, setting: Setting) -> tuple[list[int], int, list[Component]]:
        """As `_inference`. The state of a layer is its adapters with their optimizer, and what it keeps of a batch."""
        config, layers = self.model.config, self.model.config.layers
        others = [block.unquantized for block in self.blocks]
        found = training(
            config,
            self.linears,
            sum(others),
            setting.context,
            setting.batch,
            setting.rank,
            setting.train,
            others_itemsize=ITEMSIZE[self.dtype],
        )
        passing = sum(size for name, size in found.components.items() if name in _PASSING)
        optimized = sum(found.components[name] for name in _OPTIMIZED)
        casts = found.components.get(_CASTS, 0)
        kept = found.total - passing - optimized - casts
        first = (optimized + kept) // layers
        states = self._by_layer([optimized + kept - first * (layers - 1), *[first] * (layers - 1)])
        states = [state + casts * count // max(1, sum(others)) for state, count in zip(states, others)]
        sentences = list(found.formula)
        parts = [
            Component("adapters and optimizer", optimized, sentences[:1]),
            Component("activations", kept + passing, sentences[1 + (_CASTS in found.components) :]),
        ]
        if casts:
            parts.insert(0, Component(_CASTS, sum(states) - optimized - kept, sentences[1:2]))
        return states, max(passing, self.weights.largest), parts

    def _by_layer(self, sizes: Sequence[int]) -> list[int]:
        """`sizes`, one for each layer, as the state of each block."""
        left = iter(sizes)
        # A checkpoint may hold more layers than its config runs.
        return [next(left, 0) if block.name.startswith(STACK_PREFIX) else 0 for block in self.blocks]


def _stored_method(model: Model, dtype: str) -> str:
    """The method by which a stored checkpoint multiplies. One that qcli does not know is taken to multiply in 16 bits."""
    schemes = {parameter.scheme for parameter in model.parameters if parameter.linear}
    return next((method for method in QUANTIZED if method in schemes), dtype)
