"""A part of benchmarks/gpu.py: the whole `generate` of a 7B-shaped Llama with random weights, for one sequence."""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import transformers
from cpu_models import PROMPT, checkpoint, speed, streamed_bytes
from rows import Row

import qcli
from qcli.generation import graph as decode_graph

NEW, FEW = 128, 8  # new tokens: on a GPU, on the stand-in


def run(gpu, limits: dict[str, float], folder: Path) -> Iterator[tuple[str, Row]]:
    """(unit, row). Every library runs the same loop. "eager" is transformers' loop, which launches every kernel from the host."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source, where = checkpoint(folder, "tiny" if gpu.tiny else "7b"), gpu.device.type
    new = FEW if gpu.tiny else NEW
    loaders = {
        "qcli": lambda: qcli.load(str(source), bits=4, device=where)[0],
        "bitsandbytes": lambda: theirs(source, gpu.device),
        "bfloat16": lambda: qcli.load(str(source), device=where)[0],
    }
    decode, prefill, load, memory, limit = {}, {}, {}, [], 0.0
    for name, loader in loaders.items():
        gc.collect()
        gpu.free()
        started = time.perf_counter()
        model, loading = peak(gpu, loader)
        load[name] = time.perf_counter() - started
        if name == "qcli":
            limit = limits["copy"] / streamed_bytes(model)
        weights = sum(t.nbytes for t in {t.data_ptr(): t for t in tensors(model)}.values())
        cache = keys_and_values(model, PROMPT + new)
        used = Row(f"memory at its peak, {name}", {"weights": weights / 1e9, "keys and values": cache / 1e9})
        used.figures["loading"] = loading / 1e9
        for way in ("", " eager") if name != "bitsandbytes" else (" eager",):  # not all of their launches can be captured
            with mock.patch.object(decode_graph, "capture_for", graph_or_none(way)):
                found, running = peak(gpu, lambda model=model: speed(model, new))
            decode[name + way], prefill[name + way] = found["decode"], found["prefill"]
            used.figures[f"generate{way}"] = running / 1e9
            used.compare(f"generate{way} / (weights + keys and values)", running / (weights + cache), None)
        memory.append(used.compare("loading / weights", loading / weights, None))
        del model
    ours, common = decode["qcli"], decode["bitsandbytes eager"]
    row = Row("generate NF4, decode", {"limit": limit, **decode})
    row.compare("faster than transformers + bitsandbytes", ours / common, 3)
    row.compare("faster than transformers in bfloat16", ours / decode["bfloat16 eager"], 1)
    row.compare("faster than bfloat16 as a graph", ours / decode["bfloat16"], None)
    row.compare("a graph faster than eager", ours / decode["qcli eager"], None)
    row.compare("of the bandwidth limit", ours / limit, None, 0.6)
    yield "tokens per second", row
    yield "tokens per second", Row(f"generate NF4, prefill of {PROMPT}", prefill)
    yield "seconds", Row("load a checkpoint of bfloat16", load)
    for row in memory:
        yield "GB", row


def graph_or_none(way: str) -> Callable:
    """The function that decides whether a step is captured: qcli's own, or one that never captures."""
    return (lambda model: None) if way else decode_graph.capture_for


def theirs(source: Path, device: torch.device):
    """transformers with bitsandbytes, NF4 with double quantization."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16, device_map={"": device}
    ).eval()


def peak(gpu, run: Callable[[], object]) -> tuple[object, int]:
    """(the result of `run`, the most bytes that tensors used on the GPU meanwhile). The bytes are 0 on a CPU."""
    if gpu.device.type != "cuda":
        return run(), 0
    torch.cuda.reset_peak_memory_stats()
    result = run()
    return result, torch.cuda.max_memory_allocated()


def tensors(model) -> list[torch.Tensor]:
    """Every tensor of a model's weights, including those in bitsandbytes' quant_state."""
    found = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        found += [t for t in (getattr(state, "absmax", None), getattr(nested, "absmax", None)) if t is not None]
    return found


def keys_and_values(model, tokens: int) -> int:
    """Bytes of a cache for `tokens` tokens."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * tokens * model.dtype.itemsize
