"""Compares the memory that `qcli estimate-memory` predicts with what a model takes, each in a process of its own.

    python benchmarks/memory.py --output benchmarks/results/memory-cpu.json
    python benchmarks/memory.py --device cuda --output benchmarks/results/memory-gpu.json

Weights and cache are compared with the tensors of a loaded model. On a CPU the total is compared with the process's high-water mark
(VmHWM), which counts pages of the mapped checkpoint when they are read. On a GPU it is compared with the peak that torch allocated,
and with the memory that is missing on the device at the end.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from make_checkpoint import make_checkpoint
from measure import machine

from qcli import console
from qcli.memory.components import STORED, Costs, Setting
from qcli.memory.costs.overhead import overhead
from qcli.memory.model.opening import open_model
from qcli.sizes import format_bytes

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
SHAPES = {
    "0.6B": {"layers": 16, "hidden": 1536, "intermediate": 4608, "vocabulary": 49152, "heads": 16, "kv_heads": 8},
    "1.1B": {"layers": 22, "hidden": 2048, "intermediate": 5632, "vocabulary": 32000, "heads": 32, "kv_heads": 4},
}
SETTINGS = {"cpu": ((512, 1),), "cuda": ((2048, 1), (2048, 8), (8192, 1), (8192, 8))}  # (tokens, sequences)

# Runs a prompt and one step through a checkpoint, and prints the memory of its tensors and of the process.
RUN = """
import json, sys
import torch
import qcli
from qcli.generation.step import cache_argument
from qcli.process import peak_memory
folder, device, tokens, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model, _ = qcli.load(folder, device=device)
name = cache_argument(model)
ids = torch.randint(5, 1000, (batch, tokens - 1), device=device)
with torch.inference_mode():
    out = model(ids, use_cache=True, logits_to_keep=1)
    out = model(out.logits[:, -1:].argmax(-1), use_cache=True, **{name: out[name]})
held = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
names = ("weight_quant_state", "weight_format", "inv_freq")  # JSON beside a weight, a marker, and what is computed at the start
extra = {t.data_ptr() for n, t in model.named_buffers() if n.endswith(names)}
cache = [t for layer in out[name].layers for t in (layer.keys, layer.values)]
found = {
    "weights": sum(t.numel() * t.element_size() for t in held if t.data_ptr() not in extra),
    "cache": sum(t.numel() * t.element_size() for t in cache),
}
if device == "cuda":
    free, total = torch.cuda.mem_get_info()
    found |= {"allocated": torch.cuda.max_memory_allocated(), "device": total - free}
else:
    found["resident"] = peak_memory()
print(json.dumps(found))
"""


def predicted(folder: Path, device: str, tokens: int, batch: int) -> dict[str, int]:
    """Bytes of weights, of the cache, and in total, with the likely overhead."""
    model = open_model(str(folder))
    dtype = model.config.dtype
    costs = Costs(model, STORED if model.config.quantization else dtype, dtype)
    needs = costs.needs(Setting(tokens, batch, dtype, None, "transformers", None, 1), [])
    tensors = needs.weights + needs.state + needs.activations
    found = {"weights": needs.weights, "cache": needs.state}
    if device == "cuda":
        return found | {"allocated": tensors, "device": needs.likely}
    # Of an input embedding that is not also the head, only the pages of the tokens' rows are read from the file.
    untied = any(parameter.kind == "head" for parameter in model.parameters)
    rows = sum(2 * parameter.numel for parameter in model.parameters if parameter.kind == "embedding" and untied)
    beside = overhead(needs.weights, needs.activations, device="cpu").likely
    return found | {"resident": tensors - rows + beside}


def measured(folder: Path, device: str, tokens: int, batch: int) -> dict[str, int]:
    """The same, measured in a process that runs the model."""
    command = [sys.executable, "-c", RUN, str(folder), device, str(tokens), str(batch)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def checkpoints(name: str, scratch: Path) -> dict[str, Path]:
    """A model with random weights, unquantized and in 8 and 4 bits: kind -> folder."""
    folders = {"bfloat16": scratch / name}
    make_checkpoint(folders["bfloat16"], **SHAPES[name], shard_size=5_000_000_000)
    for bits in ("8", "4"):
        folders[f"{bits} bits"] = output = scratch / f"{name}-{bits}"
        command = [sys.executable, "-m", "qcli", "quantize", str(scratch / name), "--bits", bits, "--output", str(output)]
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    return folders


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SETTINGS, default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = []
    for name in SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            for kind, folder in checkpoints(name, Path(scratch)).items():
                for tokens, batch in SETTINGS[options.device]:
                    setting = (folder, options.device, tokens, batch)
                    row = {"model": name, "as": kind, "tokens": tokens, "batch": batch}
                    rows.append(row | {"predicted": predicted(*setting), "measured": measured(*setting)})
    parts = list(rows[0]["measured"])
    console.table(
        "predicted / measured",
        ("model", "as", "tokens", "batch", *parts),
        [[r["model"], r["as"], r["tokens"], r["batch"], *(_compared(r, part) for part in parts)] for r in rows],
        left=(0, 1),
    )
    if options.output:
        options.output.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")


def _compared(row: dict, part: str) -> str:
    ours, real = row["predicted"][part], row["measured"][part]
    return f"{format_bytes(ours)} / {format_bytes(real)}, {ours / real - 1:+.2%}"


if __name__ == "__main__":
    main()
