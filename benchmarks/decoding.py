"""Whole models on this CPU beside llama.cpp and bitsandbytes, with the same bits and the same threads.

    python benchmarks/decoding.py --folder FOLDER [--llama-cpp PYTHON] [--only 135m,360m,1.1b,3b] [--bits 4,8]
        [--heads 16,8] [--prompts 1,16,128,1024] [--real NAME=MODEL=GGUF] [--repeat N] [--no-bitsandbytes]

Models are Llamas with random weights in the shapes of SmolLM2-135M and -360M, TinyLlama-1.1B and Llama-3.2-3B. They are made in
FOLDER (12 GB for all), quantized by qcli (NF4 with double quantization, LLM.int8()), and written as GGUF (Q4_0, Q8_0). --real adds
a model with weights of its own: an unquantized checkpoint, and a GGUF file of it (its four-bit form). --heads are bits of the
output head, which GGUF files quantize, too. Each prompt is read, and then 48 tokens are made one at a time, by qcli and llama.cpp
in turn. Rates are medians. bitsandbytes, through transformers, runs after them.

PYTHON is an interpreter with xllamacpp and gguf (see llama_cpp_speed.py). "limit" is what reading the weights once a token would
allow at the speed of memory that is measured here. Prints tables and writes benchmarks/results/decoding-CPU.json.
"""

import argparse
import json
import logging
import statistics
import subprocess
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from cpu_models import bitsandbytes_speed  # noqa: E402
from make_checkpoint import make_checkpoint  # noqa: E402
from measure import machine  # noqa: E402
from rows import Row, save, show  # noqa: E402

import qcli  # noqa: E402
from qcli import console  # noqa: E402
from qcli.generation import memory_limit  # noqa: E402
from qcli.generation.decode import Decoding  # noqa: E402
from qcli.generation.sampling import Sampling  # noqa: E402

NEW = 48
SHAPES = {
    "135m": {"layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152},
    "360m": {"layers": 32, "hidden": 960, "intermediate": 2560, "heads": 15, "kv_heads": 5, "vocabulary": 49152},
    "1.1b": {"layers": 22, "hidden": 2048, "intermediate": 5632, "heads": 32, "kv_heads": 4, "vocabulary": 32000},
    "3b": {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8, "vocabulary": 128256},
}
KINDS = {4: "Q4_0", 8: "Q8_0"}
NAMES = {4: "NF4", 8: "LLM.int8()"}
# (model, bits, prompt) -> (of decode or prefill, must, aim) against llama.cpp.
GOALS = {
    ("135m", 4, 16): ("decode", 1.2, 1.6),
    ("135m", 8, 16): ("decode", 1.1, 1.4),
    ("1.1b", 4, 16): ("decode", 1.4, 1.7),
    ("1.1b", 4, 1024): ("prefill", 1.5, 3),
}


class LlamaCpp:
    """llama.cpp with one GGUF file, in a process of its own."""

    def __init__(self, python: str, file: Path, write: tuple[Path, str] | None, context: int):
        command = [python, str(Path(__file__).with_name("llama_cpp_speed.py")), str(file), "--context", str(context)]
        command += ["--threads", str(torch.get_num_threads())]
        command += ["--write", str(write[0]), write[1]] if write else []
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.version = self._read()["version"]

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"llama.cpp ended with status {self.process.wait()}")

    def speed(self, prompt: int) -> dict[str, float]:
        """Tokens per second of prefill and decode."""
        self.process.stdin.write(json.dumps({"prompt": prompt, "new": NEW}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


class _NoEnd:
    eos_token_id = None


class Qcli:
    """qcli with one quantized checkpoint."""

    def __init__(self, folder: Path):
        self.model, _ = qcli.load(str(folder), device="cpu", int8_activations=None)
        self.model.generation_config.eos_token_id = None
        self.texts = 0
        self.decoding = Decoding(self.model, _NoEnd(), Sampling(max_new_tokens=NEW, temperature=0))

    def speed(self, prompt: int) -> dict[str, float]:
        """Tokens per second of prefill and decode."""
        self.texts += 1  # no prompt begins as the one before, which the cache holds
        ids = torch.randint(300, 4000, (prompt,), generator=torch.Generator().manual_seed(self.texts)).tolist()
        done = self.decoding.generate(ids, lambda token: None)
        return {"prefill": done.prefill_rate, "decode": done.decode_rate}


def measured(model: str, source: Path, bits: int, head: int, options, gguf: Path | None) -> list[Row]:
    """The rows of one model at one number of bits."""
    folder = source.with_name(f"{source.name}-{bits}" + ("" if head == 16 else f"-head-{head}"))
    if not folder.exists():
        qcli.quantize(str(source), folder, bits=bits, head=head)
    method = NAMES[bits] + ("" if head == 16 else f" with {head} bits for the head")
    ours, theirs = Qcli(folder), None
    if options.llama_cpp and (gguf is None or bits == 4):
        file = gguf or source.with_name(f"{source.name}-{KINDS[bits]}.gguf")
        theirs = LlamaCpp(options.llama_cpp, file, None if gguf else (source, KINDS[bits]), max(options.prompts) + NEW + 64)
        options.versions.add(theirs.version)
    rows, sides = [], {"qcli": ours, "llama.cpp": theirs}
    for prompt in options.prompts:
        found: dict[str, list[dict]] = {name: [] for name, side in sides.items() if side}
        for turn in range(options.repeat + 1):
            for name in found:
                rates = sides[name].speed(prompt)
                if turn:  # the first warms up
                    found[name].append(rates)
        for what in ("prefill", "decode"):
            figures = {name: statistics.median(each[what] for each in rates) for name, rates in found.items()}
            work = f"{model} {method}, " + (f"prompt of {prompt}" if what == "prefill" else f"tokens after {prompt}")
            row = Row(work, figures)
            if what == "decode":
                figures["limit"] = memory_limit.memory_speed(ours.model) / memory_limit.bytes_a_step(ours.model)
                row.compare(
                    "of the memory limit", figures["qcli"] / figures["limit"], 0.7 if (model, bits) == ("1.1b", 4) else None, 0.85
                )
            goal, must, aim = GOALS.get((model, bits, prompt), (None, None, None))
            if theirs:
                must, aim = (must, aim) if goal == what else (None, None)
                row.compare("faster than llama.cpp", figures["qcli"] / figures["llama.cpp"], must, aim)
            rows.append(row)
    if theirs:
        theirs.close()
    del ours
    if options.bitsandbytes and head == 16:
        rates = bitsandbytes_speed(folder, fused=False, new=3 if bits == 4 else 16)
        rows.append(Row(f"{model} {NAMES[bits]}, bitsandbytes after 128", rates))
    show(rows, "tokens per second")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(each) for each in text.split(",")]  # noqa: E731
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--only", default=",".join(SHAPES))
    parser.add_argument("--bits", type=numbers, default=[4, 8])
    parser.add_argument("--heads", type=numbers, default=[16, 8])
    parser.add_argument("--prompts", type=numbers, default=[1, 16, 128, 1024])
    parser.add_argument("--real", action="append", default=[], metavar="NAME=MODEL=GGUF")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--no-bitsandbytes", dest="bitsandbytes", action="store_false")
    options = parser.parse_args()
    options.versions = set()
    logging.disable(logging.WARNING)
    rows = []
    for name, model, gguf in (each.split("=") for each in options.real):
        for bits, head in product(options.bits, options.heads):
            rows += measured(name, Path(model), bits, head, options, Path(gguf))
    for name in filter(None, options.only.split(",")):
        source = options.folder / name
        if not source.exists():
            make_checkpoint(source, shard_size=5 * 10**9, **SHAPES[name])
        for bits, head in product(options.bits, options.heads):
            rows += measured(name, source, bits, head, options, None)
    result = {"machine": machine() | {"xllamacpp": ", ".join(sorted(options.versions))}, "rows": [asdict(row) for row in rows]}
    console.out(f"wrote {save('decoding', ' '.join(str(result['machine'][each]) for each in ('cpu', 'variant')), result)}")


if __name__ == "__main__":
    main()
