"""Whether a model that is about to be loaded has room: the estimate of qcli/memory, before a byte of it is read."""

from qcli.checkpoint.source import Source
from qcli.errors import CheckpointError, DeviceError, UsageError
from qcli.memory.components import STORED, Costs, Setting
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.headers import parameters_of
from qcli.memory.model.opening import Model
from qcli.memory.model.tensor_rules import with_head
from qcli.schemes import BY_BITS, NAMED
from qcli.sizes import format_bytes

CONTEXT = 512  # tokens of cache and activations that have to find room too


def costs_of(source: Source, method: str | None, dtype: str, head: int | None = None) -> Costs | None:
    """What `source` takes, quantized by the scheme named `method` while it is read (None: as it is stored), the rest in `dtype` or
    "auto". `head` is the bits of a quantized output head. None where the estimate does not know the model or cannot make it out: it
    is for the loader to judge."""
    try:
        config = ModelConfig(source.config, f"{source.label}/config.json")
        half = config.dtype if dtype == "auto" else dtype
        parameters = parameters_of(source, config)
        parameters = (with_head(parameters, head) if head else None) or parameters
        model = Model(source.label, config, parameters, "safetensors headers")
        return Costs(model, method or (STORED if config.quantization else half), half)
    except (CheckpointError, UsageError, ArithmeticError, LookupError, TypeError, ValueError):
        return None


def weight_bytes(source: Source, method: str | None, dtype: str) -> int:
    """Bytes of the weights in memory; as they lie in the files where the estimate cannot make the model out."""
    costs = costs_of(source, method, dtype)
    return costs.weights.total if costs else sum(info.nbytes for info in source.tensors.values())


def fewer_bits(source: Source, method: str | None) -> dict[int, str]:
    """Bits and scheme names with fewer bits than `source` has under `method`, the most bits first; none for a quantized source."""
    current = NAMED[method].bits if method else 16
    return {} if source.quantization else {bits: BY_BITS[bits] for bits in sorted(BY_BITS, reverse=True) if bits < current}


def check_room(source: Source, method: str | None, dtype: str, free: int, place: str, head: int | None = None) -> None:
    """Raises DeviceError where `source`, quantized by `method` while it is read, needs more than the `free` bytes of `place` at the
    least, and says which option would fit. `dtype` is that of what is not quantized, or auto; `head` as in `costs_of`."""
    costs = costs_of(source, method, dtype, head)
    needed = _least(costs)
    if costs is None or needed is None or needed <= free:
        return
    fitting = []
    for bits, name in fewer_bits(source, method).items():
        smaller = _least(costs_of(source, name, dtype))
        if smaller is not None and smaller <= free:
            fitting.append(f"--bits {bits}")
    ways = [*fitting, *(["--device-map auto"] if place != "memory" else [])]
    raise DeviceError(
        f"{source.label} needs {format_bytes(needed)} of {place} at the least, and {format_bytes(free)} are free",
        f"Try {' or '.join(ways)}; qcli estimate-memory {source.label} tells more."
        if ways
        else f"See what would fit: qcli estimate-memory {source.label}",
    )


def _least(costs: Costs | None) -> int | None:
    """Bytes of weights, cache and activations, without what the process takes beside them."""
    if costs is None:
        return None
    context = min(CONTEXT, costs.model.config.max_context or CONTEXT)
    setting = Setting(context=context, batch=1, dtype=costs.dtype, kv_dtype=None, runtime="transformers", train=None, rank=1)
    try:
        needs = costs.needs(setting, [])
    except (CheckpointError, UsageError, ArithmeticError, LookupError, TypeError, ValueError):
        return None
    return needs.weights + needs.state + needs.activations
