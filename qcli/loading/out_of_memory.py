"""What was needed, what was free and which option would fit: the message of a model that does not find room on its GPUs.

The numbers are those of qcli/memory, which `estimate-memory` shows. Where it does not know a model, a message goes without them.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable

import torch
from torch import nn

from qcli.checkpoint.dtypes import CODES
from qcli.checkpoint.source import Source
from qcli.errors import CheckpointError, DeviceError, KernelError, UsageError
from qcli.formats import Weight, stored_tensors
from qcli.loading.room import fewer_bits, weight_bytes
from qcli.memory.costs.activations import activations
from qcli.memory.costs.cache import cache
from qcli.memory.model.config import ModelConfig
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.schemes import BY_BITS, NAMED
from qcli.sizes import format_bytes

Free = dict[int, tuple[int, int]]  # GPU -> bytes that are free, bytes that it has


# What torch, its libraries and our launcher raise where memory runs out; other things too.
KINDS = (RuntimeError, MemoryError, KernelError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, CUDA, cuBLAS or the driver that loads a kernel ran out of GPU memory."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, KINDS) and ("out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text)
    )


def free_memory(gpus: Iterable[int]) -> Free:
    """What is free on each GPU, with what torch holds there and does not use."""
    found = {}
    for gpu in gpus:
        free, total = torch.cuda.mem_get_info(gpu)
        found[gpu] = free + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu), total
    return found


def _had(free: Free) -> str:
    parts = [f"GPU {gpu} had {format_bytes(left)} of {format_bytes(total)} free" for gpu, (left, total) in free.items()]
    return "; " + ", ".join(parts) if parts else ""


def while_loading(source: Source, method: str | None, dtype: str, free: Free, split: bool) -> DeviceError:
    """The error for weights that found no room on the GPUs; `free` is what there was before, `split` whether a device map
    was asked for."""
    needed = weight_bytes(source, method, dtype)
    message = f"out of memory: the weights of {source.label} need {format_bytes(needed)}{_had(free)}"
    other = "--device-map auto, which keeps a part in the CPU's memory"
    if split:
        other = "a --max-memory that leaves more room on each GPU"
    return DeviceError(message, _smaller(source, method, dtype, sum(left for left, _ in free.values()), other))


def without_room(source: Source, method: str | None, dtype: str, given: str) -> DeviceError:
    """The error for a device map that leaves modules to the disk."""
    needed = weight_bytes(source, method, dtype)
    message = f"the weights of {source.label} need {format_bytes(needed)} and do not fit {given}; qcli keeps none on disk"
    return DeviceError(message, _smaller(source, method, dtype, math.inf, "a larger --max-memory"))


def _smaller(source: Source, method: str | None, dtype: str, room: float, other: str) -> str:
    """Which numbers of bits make it fit `room` bytes, and the other way out."""
    sizes = {bits: weight_bytes(source, name, dtype) for bits, name in fewer_bits(source, method).items()}
    fits = [f"--bits {bits} ({format_bytes(size)})" for bits, size in sizes.items() if size < room]
    return f"Try {' or '.join([*fits, other])}."


def while_generating(model, prompt_tokens: int, new_tokens: int, free: Free) -> DeviceError:
    """The error for a text that found no room beside the weights; `free` is what there was before."""
    tokens = prompt_tokens + new_tokens
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    beside = f"beside {format_bytes(weights)} of weights{_had(free)}"
    other = "--device-map auto with a --max-memory that leaves room"
    dtype = str(model.dtype).removeprefix("torch.")
    quantized = next((module for module in model.modules() if isinstance(module, QuantizedLinear)), None)
    method = quantized.scheme.name if quantized and quantized.scheme else dtype
    try:
        config = ModelConfig(model.config.to_dict(), type(model).__name__)
        kept = cache(config, tokens, kv_dtype=dtype)
        made = activations(config, prompt_tokens, context=tokens, method=method, dtype=dtype)
        working = max(made.prefill, made.decode)
    except (CheckpointError, UsageError, ArithmeticError, LookupError, TypeError, ValueError):
        return DeviceError(f"out of memory: {tokens:,} tokens found no room {beside}", f"Try {other}.")
    message = (
        f"out of memory: {tokens:,} tokens need {format_bytes(kept.total)} for keys and values and about "
        f"{format_bytes(working)} for activations, {beside}"
    )
    room = sum(left for left, _ in free.values())
    fits = []

    def too_many(n: int) -> bool:
        return cache(config, prompt_tokens + n, kv_dtype=dtype).total + working > room

    most = bisect_left(range(1, new_tokens), True, key=too_many)
    if most:
        fits.append(f"--max-new-tokens {most}")
    linears = [m for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")]
    if quantized is None:
        for bits, name in sorted(BY_BITS.items(), reverse=True):
            held = sum(spec.nbytes for m in linears for spec in stored_tensors(NAMED[name], _weight(m))[1])
            saved = sum(m.weight.nbytes for m in linears) - held
            if kept.total + working < room + saved:
                fits.append(f"--bits {bits} (saves {format_bytes(saved)})")
    return DeviceError(message, f"Try {' or '.join([*fits, other])}.")


def _weight(module: nn.Linear) -> Weight:
    return Weight("weight", module.out_features, module.in_features, CODES[str(module.weight.dtype).removeprefix("torch.")])
