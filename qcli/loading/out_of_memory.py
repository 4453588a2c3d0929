"""What was needed, what was free and which option would fit: the message of a model that does not find room on its GPUs."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from qcli import methods
from qcli.checkpoint import dtypes
from qcli.checkpoint.modules import Layout
from qcli.checkpoint.source import Source
from qcli.errors import DeviceError, KernelError
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit
from qcli.sizes import format_bytes

# Bits per weight of LLM.int8(), its scales aside, and of NF4 with double quantization in blocks of 64 (4 + 8/64 + 32/(64*256)).
_BITS = {8: 8.0, 4: 4.127}

Free = dict[int, tuple[int, int]]  # GPU -> bytes that are free, bytes that it has


# What torch, its libraries and our launcher raise where memory runs out; other things too.
KINDS = (RuntimeError, MemoryError, KernelError)


def is_one(error: BaseException) -> bool:
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


def weight_bytes(source: Source, layout: Layout, method: str | None, dtype: str) -> int:
    """What the weights take in memory, quantized by `method` where that is not None, the rest in `dtype` ("auto": as stored)."""
    made = methods.make_method(method, {}) if method else None
    total = 0
    for name, (_, info) in source.tensors.items():
        linear = layout.linears.get(name)
        if made and linear and not layout.skipped(linear.module, None):
            specs = made.outputs(name, linear.out_features, linear.in_features, info.dtype)
            total += sum(spec.nbytes for spec in specs)
        elif dtype != "auto" and info.dtype in dtypes.FLOATS and not source.quantization:
            total += info.numel * dtypes.ITEMSIZE[dtypes.CODES[dtype]]
        else:
            total += info.nbytes
    return total


def while_loading(source: Source, layout: Layout, method: str | None, dtype: str, free: Free, split: bool) -> DeviceError:
    """The error for weights that found no room on the GPUs; `free` is what there was before, `split` whether a device map
    was asked for."""
    needed = weight_bytes(source, layout, method, dtype)
    message = f"out of memory: the weights of {source.label} need {format_bytes(needed)}{_had(free)}"
    other = "--device-map auto, which keeps a part in the CPU's memory"
    if split:
        other = "a --max-memory that leaves more room on each GPU"
    return DeviceError(message, _smaller(source, layout, method, dtype, sum(left for left, _ in free.values()), other))


def without_room(source: Source, layout: Layout, method: str | None, dtype: str, given: str) -> DeviceError:
    """The error for a device map that leaves modules to the disk."""
    needed = weight_bytes(source, layout, method, dtype)
    message = f"the weights of {source.label} need {format_bytes(needed)} and do not fit {given}; qcli keeps none on disk"
    return DeviceError(message, _smaller(source, layout, method, dtype, math.inf, "a larger --max-memory"))


def _smaller(source: Source, layout: Layout, method: str | None, dtype: str, room: float, other: str) -> str:
    """Which numbers of bits make it fit `room` bytes, and the other way out."""
    sizes = {}
    if not source.quantization:
        current = methods.method_class(method).bits if method else 16
        sizes = {b: weight_bytes(source, layout, methods.DEFAULT_BY_BITS[b], dtype) for b in (8, 4) if b < current}
    fits = [f"--bits {bits} ({format_bytes(size)})" for bits, size in sizes.items() if size < room]
    return f"Try {' or '.join([*fits, other])}."


def kv_bytes(config, tokens: int, itemsize: int) -> int:
    """What keys and values of `tokens` take over all layers of a transformers text config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * head_dim * tokens * itemsize


def activation_bytes(model, tokens: int) -> int:
    """A rough bound on a prefill's working memory: the widest layer's inputs and outputs, float32 logits of one token, and the
    largest quantized weight in 16 bits, for products of many tokens are made that way."""
    config = model.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    largest = [m.in_features * m.out_features for m in model.modules() if isinstance(m, (Linear4bit, Linear8bit))]
    size = model.dtype.itemsize
    return tokens * (4 * config.hidden_size + 3 * inner) * size + 8 * config.vocab_size + size * max(largest, default=0)


def while_generating(model, prompt_tokens: int, new_tokens: int, free: Free) -> DeviceError:
    """The error for a text that found no room beside the weights; `free` is what there was before."""
    config, size = model.config.get_text_config(decoder=True), model.dtype.itemsize
    tokens = prompt_tokens + new_tokens
    cache, working = kv_bytes(config, tokens, size), activation_bytes(model, prompt_tokens)
    weights = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    message = (
        f"out of memory: {tokens:,} tokens need {format_bytes(cache)} for keys and values and about {format_bytes(working)} for "
        f"activations, beside {format_bytes(weights)} of weights{_had(free)}"
    )
    room = sum(left for left, _ in free.values())
    fits = []
    per_token = kv_bytes(config, 1, size)
    most = int((room - working) // per_token) - prompt_tokens
    if 0 < most < new_tokens:
        fits.append(f"--max-new-tokens {most}")
    linears = [m for n, m in model.named_modules() if type(m) is nn.Linear and not n.endswith("lm_head")]
    if not any(isinstance(m, (Linear4bit, Linear8bit)) for m in model.modules()):
        for bits, taken in _BITS.items():
            saved = sum(m.weight.nbytes - m.weight.numel() * taken / 8 for m in linears)
            if cache + working < room + saved:
                fits.append(f"--bits {bits} (saves {format_bytes(saved)})")
    fits.append("--device-map auto with a --max-memory that leaves room")
    return DeviceError(message, f"Try {' or '.join(fits)}.")
