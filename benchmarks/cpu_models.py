"""The rows of benchmarks/cpu.py for whole models: quantizing a checkpoint, and generating."""

import os
import shutil
import time
from pathlib import Path
from statistics import median

import bitsandbytes as bnb
import torch
import transformers
from cpu_ops import read_bandwidth
from make_checkpoint import make_checkpoint
from measure import alternate

import qcli
from qcli.generation.decode import Sampling
from qcli.generation.decode import generate as decode
from qcli.generation.step import cache_argument
from qcli.nn.linear_4bit import Linear4bit
from qcli.quantization.quantize import make_plan, run_plan
from qcli.quantization.shard_files import SYNC_BYTES

PROMPT, NEW = 128, 48


SHAPES = {
    # 8 GB of bfloat16: layers of an 8B Llama.
    "8gb": {"layers": 17, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8},
    "1.1b": {"layers": 22, "hidden": 2048, "intermediate": 5632, "heads": 32, "kv_heads": 4},
    "7b": {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32},
    "tiny": {"layers": 2, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 4},
}


def checkpoint(folder: Path, name: str) -> Path:
    """A Llama with random weights. Created if missing."""
    path = folder / name
    if not path.exists():
        make_checkpoint(path, vocabulary=32000, shard_size=5 * 10**9, **SHAPES[name])
    return path


def quantize(row, folder: Path) -> list:
    """`qcli quantize` compared with reading the source once and writing the output once, with as many syncs."""
    source, output, rows = checkpoint(folder, "8gb"), folder / "out", []
    files = sorted(source.glob("*.safetensors"))
    for bits in (4, 8):
        shutil.rmtree(output, ignore_errors=True)
        plan = make_plan(str(source), output, bits=bits)

        def run(plan=plan):
            shutil.rmtree(output, ignore_errors=True)
            run_plan(plan, device="cpu")

        def write(size=plan.output_bytes):
            shutil.rmtree(output, ignore_errors=True)
            write_once(folder / "plain", size)

        times = alternate({"read": lambda: read_once(files), "write": write, "qcli": run}, 3)
        plain = times["read"] + times["write"]
        found = row(f"quantize --bits {bits}, {plan.source_bytes / 1e9:.1f} GB in page cache", times)
        must, aim = (1.5, 1.1) if bits == 4 else (None, None)
        rows.append(found.compare("time / (read + write)", times["qcli"] / plain, must, aim, at_most=True))
    shutil.rmtree(output, ignore_errors=True)
    return rows


def read_once(files: list[Path]) -> None:
    """Reads every byte of the files into one buffer."""
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def write_once(path: Path, size: int) -> None:
    """Writes `size` bytes, and syncs as often as `qcli quantize`."""
    data, unsynced = memoryview(bytearray(os.urandom(1 << 20))), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(fd, 0, size)
    for offset in range(0, size, len(data)):
        unsynced += os.pwrite(fd, data[: size - offset], offset)
        if unsynced >= SYNC_BYTES:
            os.fdatasync(fd)
            unsynced = 0
    os.fdatasync(fd)
    os.close(fd)
    path.unlink()


def generate(row, folder: Path) -> list:
    """Decode and prefill of a 1.1B Llama, compared with transformers and bitsandbytes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    has_fused = bnb.nn.modules.has_avx512bf16()
    source, rows = checkpoint(folder, "1.1b"), []
    found, bandwidths = {}, []
    for name, bits in (("NF4", 4), ("LLM.int8()", 8)):
        output = folder / f"1.1b-{bits}"
        if not output.exists():
            qcli.quantize(str(source), output, bits=bits)
        model, _ = qcli.load(str(output), device="cpu")
        found[name] = speed(model)
        if bits == 4:
            streamed = streamed_bytes(model)
        del model
        bandwidths.append(read_bandwidth())
    for name, bits in (("NF4", 4), ("LLM.int8()", 8)):
        found[f"{name} bitsandbytes"] = bitsandbytes_speed(folder / f"1.1b-{bits}", fused=False, new=3 if bits == 4 else 16)
    if has_fused:
        found["NF4 bitsandbytes fused"] = bitsandbytes_speed(folder / "1.1b-4", fused=True, new=NEW)
    # The best of several measurements: a slow one would make the ratio look too good.
    limit = max(*bandwidths, read_bandwidth()) / streamed
    ours = found["NF4"]["decode"]
    decoded = row("generate NF4, decode", {"limit": limit, **_column(found, "NF4", "decode")})
    decoded.compare("of the limit", ours / limit, 0.5, 0.75)
    decoded.compare("faster than bitsandbytes", ours / found["NF4 bitsandbytes"]["decode"], 5)
    if "NF4 bitsandbytes fused" in found:
        decoded.compare("faster than its AVX512_BF16 path", ours / found["NF4 bitsandbytes fused"]["decode"], None)
    ours = found["LLM.int8()"]["prefill"]
    filled = row("generate LLM.int8(), prefill of 128", {**_column(found, "LLM.int8()", "prefill")})
    filled.compare("faster than bitsandbytes", ours / found["LLM.int8() bitsandbytes"]["prefill"], 1)
    rest = [
        row("generate NF4, prefill of 128", {**_column(found, "NF4", "prefill")}),
        row("generate LLM.int8(), decode", {**_column(found, "LLM.int8()", "decode")}),
    ]
    return [*rows, decoded, filled, *rest]


def _column(found: dict, method: str, what: str) -> dict[str, float]:
    """The speed of each library with the method."""
    own = [name for name in found if name.startswith(method)]
    return {name.removeprefix(method).strip() or "qcli": found[name][what] for name in own}


def speed(model, new: int = NEW) -> dict[str, float]:
    """Tokens per second of prefill and decode through qcli's own loop: medians of three."""
    model.generation_config.eos_token_id = None

    class NoEnd:
        eos_token_id = None

    runs = [
        decode(model, NoEnd(), list(range(5, 5 + PROMPT)), Sampling(max_new_tokens=new, temperature=0), lambda token: None)
        for _ in range(4)
    ][1:]
    return {"prefill": median(r.prefill_rate for r in runs), "decode": median(r.decode_rate for r in runs)}


def bitsandbytes_speed(folder: Path, *, fused: bool, new: int) -> dict[str, float]:
    """The same with transformers and bitsandbytes: the model's forward, token by token."""
    bnb.nn.modules.has_avx512bf16 = lambda: fused
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
    rates = []
    with torch.inference_mode():
        for _ in range(2):
            ids = torch.arange(5, 5 + PROMPT)[None]
            cache = {cache_argument(model): transformers.DynamicCache(config=model.config)}
            started = time.perf_counter()
            token = model(ids, **cache).logits[:, -1:].argmax(-1)
            filled = time.perf_counter()
            for _ in range(new):
                token = model(token, **cache).logits[:, -1:].argmax(-1)
            rates.append((PROMPT / (filled - started), new / (time.perf_counter() - filled)))
    return {"prefill": rates[-1][0], "decode": rates[-1][1]}


def streamed_bytes(model) -> int:
    """Bytes of weights that a token reads: those of every linear module, without the embedding."""
    total = 0
    for module in model.modules():
        if isinstance(module, (Linear4bit, torch.nn.Linear)):
            tensors = [*module.parameters(), *module.buffers()]
            total += sum(t.nbytes for t in tensors if t.numel() > 1024)
    return total
