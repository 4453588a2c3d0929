"""What calibrating and quantizing takes, beside llm-compressor: processor seconds and peak memory, on the same model and tokens.

    python benchmarks/calibrating.py MODEL [MODEL ...] --peer PYTHON [--tokens N] [--text FILE] [--seconds N]

MODEL is a folder, PYTHON the interpreter of an environment with llm-compressor. Each run is a process of its own on one thread,
which reads the model, calibrates, and writes a checkpoint. Its seconds are user and system time, and its memory the peak of what is
resident, both of the whole process as the system counts them. A process that does nothing else says what imports take.

All runs read the same windows of tokens. "plain" are the same settings on both sides: GPTQ on integers of 4 bits in groups of 64,
scales by the largest weight, blocks in their order, each seeing the rounded ones before it, and a compressed-tensors checkpoint.
llm-compressor gets the model in float32, in which it is faster than in bfloat16 on processors without instructions for it. qcli's
default, `--bits 4 --calibrate`, stands beside, with its check on held-out windows and without.

Writes benchmarks/results/calibrating-NAME.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from transformers import AutoConfig, AutoTokenizer  # noqa: E402

from benchmarks.measure import machine  # noqa: E402
from benchmarks.rows import save  # noqa: E402
from qcli import console  # noqa: E402
from qcli.streaming.corpus import read_windows  # noqa: E402

TOKENS = 16_384
PLAIN = {"search": "none", "transform": "none", "order": "sequential"}
IMPORTS = {"qcli": "import qcli.quantization.quantize, transformers, torch", "llm-compressor": "import llmcompressor, transformers"}

QCLI = """
import json, sys
import qcli
job = json.loads(sys.argv[1])
options = job["options"]
qcli.quantize(job["model"], job["output"], calibrate=True, text=job["text"], tokens=job["tokens"], **options)
"""

PEER = """
import json, sys
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM

job = json.loads(sys.argv[1])
windows = json.load(open(job["windows"]))
weights = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64, "observer": "memoryless_minmax"}
scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(ids) for ids in windows]})
oneshot(
    model,
    dataset=data,
    recipe=[GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])],
    num_calibration_samples=len(windows),
    max_seq_length=len(windows[0]),
)
model.save_pretrained(job["output"], save_compressed=True)
"""

ROWS: list[tuple[str, str, dict]] = [
    ("llm-compressor", "plain", {}),
    ("qcli", "plain", {"method": "rtn", "group_size": 64, "format": "compressed-tensors", "check": False, "settings": PLAIN}),
    ("qcli", "default, --no-check", {"bits": 4, "check": False}),
    ("qcli", "default", {"bits": 4}),
]


def spent(python: str, program: str, *arguments: str, limit: int) -> dict[str, float]:
    """What a process of `program` took, or its `error`."""
    paths = {"PYTHONPATH": str(ROOT)} if python == sys.executable else {"PYTHONPATH": ""}
    with tempfile.TemporaryFile() as log:
        started = time.monotonic()
        process = subprocess.Popen([python, "-c", program, *arguments], env=os.environ | paths, stdout=log, stderr=log)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - started > limit:
                process.kill()
                os.wait4(process.pid, 0)
                return {"error": f"not done after {limit} seconds"}
            time.sleep(0.2)
        if status:
            log.seek(0)
            return {"error": log.read().decode(errors="replace").strip().splitlines()[-1]}
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "seconds": round(time.monotonic() - started, 1),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def measure(model: str, args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """The result of one model, after each of its rows."""
    limit = AutoConfig.from_pretrained(model).max_position_embeddings
    corpus = read_windows(AutoTokenizer.from_pretrained(model), args.text, default_tokens=args.tokens, model_limit=limit)
    windows = [window.ids for window in corpus.windows if len(window.ids) == corpus.sequence_length]
    (folder / "windows.json").write_text(json.dumps(windows))
    tokens = sum(len(window.ids) - len(corpus.prefix) for window in corpus.windows[: len(windows)])
    pythons = {"qcli": sys.executable, "llm-compressor": args.peer}
    rows: list[dict[str, Any]] = []
    found = {"model": Path(model).name, "text": corpus.name, "tokens": tokens, "windows": len(windows), "rows": rows}
    for tool, name, options in ROWS:
        job = {"model": model, "output": str(folder / "out"), "windows": str(folder / "windows.json")}
        job |= {"text": args.text, "tokens": tokens, "options": options}
        imports = spent(pythons[tool], IMPORTS[tool], limit=args.seconds)
        row: dict[str, Any] = {"tool": tool, "settings": name}
        row |= spent(pythons[tool], QCLI if tool == "qcli" else PEER, json.dumps(job), limit=args.seconds)
        row["import_cpu_seconds"] = imports.get("cpu_seconds")
        rows.append(row)
        if tool == "qcli" and "error" not in row and "error" not in rows[0]:
            row["share_of_cpu_seconds"] = round(row["cpu_seconds"] / rows[0]["cpu_seconds"], 3)
            row["share_of_peak"] = round(row["peak_bytes"] / rows[0]["peak_bytes"], 3)
        console.out(json.dumps(row))
        shutil.rmtree(folder / "out", ignore_errors=True)
        yield found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--peer", required=True, help="the interpreter of llm-compressor's environment")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--text", help="default: the text that comes with qcli")
    parser.add_argument("--seconds", type=int, default=3600, help="that a run may take")
    args = parser.parse_args()
    versions = "import importlib.metadata as m; print(m.version('llmcompressor'), m.version('torch'), m.version('transformers'))"
    peer = subprocess.run([args.peer, "-c", versions], capture_output=True, text=True, check=True).stdout.split()
    result: dict[str, Any] = {
        "machine": machine() | {"threads": 1},
        "peer": dict(zip(("llmcompressor", "torch", "transformers"), peer)),
        "models": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for found in measure(str(Path(model).resolve()), args, Path(folder)):
                result["models"] = [each for each in result["models"] if each["model"] != found["model"]] + [found]
                place = save("calibrating", result["machine"]["cpu"], result)
            show(found)
    console.out(str(place))


def show(found: dict[str, Any]) -> None:
    """Prints the rows of a model."""
    console.table(
        f"{found['model']}: {found['tokens']:,} tokens",
        ("tool", "settings", "CPU seconds", "of them imports", "peak", "share of CPU", "share of peak"),
        [
            (
                row["tool"],
                row["settings"],
                f"{row['cpu_seconds']}",
                f"{row['import_cpu_seconds']}",
                f"{row['peak_bytes'] / 1e9:.2f} GB",
                f"{row.get('share_of_cpu_seconds', 1):.2f}",
                f"{row.get('share_of_peak', 1):.2f}",
            )
            for row in found["rows"]
            if "error" not in row
        ],
        left=(0, 1),
    )


if __name__ == "__main__":
    main()
