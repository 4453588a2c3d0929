"""Whether a model that is about to be loaded has room: the estimate, before a byte of it is read."""

from qcli.checkpoint.source import Source
from qcli.errors import CheckpointError, DeviceError, UsageError
from qcli.memory.components import STORED, Costs, Setting
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.opening import Model
from qcli.memory.model.parameters import parameters_of
from qcli.sizes import format_bytes

CONTEXT = 512  # tokens of cache and activations that have to find room too


def check_room(source: Source, method: str | None, dtype: str, free: int, place: str) -> None:
    """Raises DeviceError where `source`, quantized by `method` while it is read (None: as it is stored), needs more than the
    `free` bytes of `place` at the least, and says which option would fit. `dtype` is that of what is not quantized, or auto.

    A model that the estimate does not know, or cannot make out, is let through: it is for the loader to judge.
    """
    try:
        config = ModelConfig(source.config, f"{source.label}/config.json")
        model = Model(source.label, config, parameters_of(source, config), "safetensors headers")
        half = config.dtype if dtype == "auto" else dtype
        stored = STORED if config.quantization else half
        setting = Setting(
            context=min(CONTEXT, config.max_context or CONTEXT),
            batch=1,
            dtype=half,
            kv_dtype=None,
            runtime="transformers",
            train=None,
            rank=1,
        )
        needed = _least(model, method or stored, setting)
        if needed <= free:
            return
        fitting = []
        if not config.quantization:
            smaller = {"llm-int8": "--bits 8", "nf4": "--bits 4"}
            fitting = [option for name, option in smaller.items() if name != method and _least(model, name, setting) <= free]
    except (CheckpointError, UsageError, ArithmeticError, LookupError, TypeError, ValueError):
        return
    ways = [*fitting, *(["--device-map auto"] if place != "memory" else [])]
    raise DeviceError(
        f"{source.label} needs {format_bytes(needed)} of {place} at the least, and {format_bytes(free)} are free",
        f"Try {' or '.join(ways)}; qcli estimate-memory {source.label} tells more."
        if ways
        else f"See what would fit: qcli estimate-memory {source.label}",
    )


def _least(model: Model, method: str, setting: Setting) -> int:
    """Bytes of weights, cache and activations, without what the process takes beside them."""
    needs = Costs(model, method, setting.dtype).needs(setting, [])
    return needs.weights + needs.state + needs.activations
