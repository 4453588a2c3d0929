"""Runs commands on thousands of damaged folders: python -m tests.fuzz.campaign --count 20000 --jobs 2

The number of a case determines it: `--only NUMBER` repeats one case and shows what it printed.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import transformers  # noqa: E402

from tests.fuzz import runs  # noqa: E402
from tests.fuzz.mutations import mutate  # noqa: E402
from tests.models import add_tokenizer  # noqa: E402

TEXT = "Once upon a time there was a mouse. " * 8
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "bos_token_id": 254,
    "eos_token_id": 255,
}
_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_models(folder: Path) -> list[Path]:
    """The intact models: unquantized, sharded, with tied weights, of another family, quantized in both ways, with a quantized
    head."""
    torch.manual_seed(0)
    made = {
        "plain": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_SMALL), {}),
        "sharded": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_SMALL), {"max_shard_size": "20KB"}),
        "wide": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**_SMALL | {"hidden_size": 64}), {}),
        "tied": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**_SMALL, tie_word_embeddings=True), {}),
        "gpt2": (
            transformers.GPT2LMHeadModel,
            transformers.GPT2Config(
                n_embd=32, n_layer=1, n_head=2, vocab_size=256, n_positions=64, bos_token_id=254, eos_token_id=255
            ),
            {},
        ),
    }
    for name, (model_class, config, options) in made.items():
        model = model_class(config).to(torch.bfloat16)
        model.save_pretrained(folder / name, **options)
        add_tokenizer(folder / name)
        settings = folder / name / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": _TEMPLATE}))
    quantized = {
        "nf4": ("plain", "--bits", "4"),
        "int8": ("plain", "--bits", "8"),
        "head": ("tied", "--bits", "4", "--head", "8"),
        "w4": ("wide", "--method", "rtn", "--group-size", "32", "--set", "zero_point=true"),
        "w3": ("wide", "--bits", "3", "--group-size", "32"),
        "w8a8": ("wide", "--method", "int8"),
        "fp8": ("wide", "--method", "fp8", "--set", "share=block"),
        "nvfp4": ("wide", "--method", "nvfp4", "--set", "activations=true"),
        "gptq": ("wide", "--bits", "4", "--group-size", "32", "--format", "gptq"),
        "awq": ("wide", "--bits", "4", "--group-size", "32", "--format", "awq"),
    }
    for name, (source, *options) in quantized.items():
        done = runs.run(["quantize", str(folder / source), *options, "-o", str(folder / name)])
        assert done.code == 0, done
    (folder / "text.txt").write_text(TEXT)
    return [folder / name for name in (*made, *quantized)]


def verbs(model: str, output: str, text: str) -> list[list[str]]:
    """Each verb, in proportion to how much it reads."""
    few = ["--max-new-tokens", "2", "--device", "cpu"]
    return [
        ["info", model],
        ["info", model, "--json"],
        ["estimate-memory", model],
        ["estimate-memory", model, "--json", "--explain"],
        ["quantize", model, "--bits", "4", "-o", output, "--device", "cpu"],
        ["quantize", model, "--bits", "8", "-o", output, "--device", "cpu"],
        ["quantize", model, "--bits", "8", "--head", "8", "-o", output, "--device", "cpu"],
        ["quantize", model, "--method", "fp8", "-o", output, "--device", "cpu"],
        ["quantize", model, "--method", "nvfp4", "-o", output, "--device", "cpu"],
        ["quantize", model, "--bits", "4", "--group-size", "32", "--format", "gptq", "-o", output, "--device", "cpu"],
        ["dequantize", model, "-o", output],
        ["quantize", model, "--dry-run", "-o", output],
        ["quantize", model, "--set", "modules=rules", "-o", output, "--device", "cpu"],
        ["generate", model, "a b", *few],
        ["generate", model, "a b", *few, "--json"],
        ["generate", model, "a", *few, "--chat"],
        ["generate", model, "a", *few, "--bits", "4"],
        ["generate", model, "a", *few, "--bits", "8", "--head", "4"],
        ["generate", model, "a", *few, "--temperature", "0.7", "--seed", "1"],
        ["evaluate", model, "--text", text, "--device", "cpu"],
        ["evaluate", model, "--text", text, "--device", "cpu", "--head", "8"],
        ["inspect-outliers", model, "--text", text, "--device", "cpu"],
        ["inspect-outliers", model, "--weights-only"],
    ]


def case(number: int, models: list[Path], work: Path) -> tuple[str, list[str], runs.Outcome]:
    """(the damage, the command, the outcome)."""
    random = Random(number)
    intact = random.choice(models)
    folder, output = work / "model", work / "out"
    for old in (folder, output, work / "out.partial"):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(intact, folder)
    before = _values(folder)
    what = f"{intact.name}: {mutate(random, folder)}"
    command = random.choice(verbs(str(folder), str(output), str(models[0].parent / "text.txt")))
    outcome = runs.run(command)
    if outcome.fault is None and outcome.code == 0 and command[0] == "quantize" and output.exists():
        if _values(folder) == before:  # no weight was damaged
            outcome.fault = runs.wrong_bytes(output, intact)
        if not (output / "config.json").exists():
            outcome.fault = "a folder under its final name that is not whole"
    if outcome.fault is None and outcome.code != 0 and output.exists():
        outcome.fault = "a refused run left a folder under its final name"
    return what, command, outcome


def _values(folder: Path) -> list[tuple[str, bytes]]:
    return [(p.name, p.read_bytes()) for p in sorted(folder.glob("*.safetensors")) if p.is_file()]


def work_through(arguments) -> tuple[Counter, list[str]]:
    """Runs the cases `first`, `first + step`, ... Returns their outcomes and the faults."""
    first, last, step, models = arguments
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    runs.limit_memory(4 << 30)
    ended, faults = Counter(), []
    with tempfile.TemporaryDirectory() as work:
        for number in range(first, last, step):
            what, command, outcome = case(number, models, Path(work))
            ended[command[0], outcome.code] += 1
            if outcome.fault:
                faults.append(f"case {number}: {what}\n  qcli {' '.join(command)}\n  {outcome.fault}")
                print(faults[-1], flush=True)
    return ended, faults


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        if options.only is not None:
            what, command, outcome = case(options.only, models, Path(folder) / "work")
            print(what, "qcli " + " ".join(command), outcome.stdout, outcome.stderr, outcome.fault or "no fault", sep="\n")
            return
        last = options.first + options.count
        parts = [(options.first + i, last, options.jobs, models) for i in range(options.jobs)]
        # If a worker is killed, this ends. A Pool would wait for the worker.
        with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
            results = list(pool.map(work_through, parts))
    ended, faults = sum((r[0] for r in results), Counter()), [fault for r in results for fault in r[1]]
    for (verb, code), count in sorted(ended.items(), key=str):
        print(f"{verb:18} exit code {code}: {count:,}")
    print(f"{options.count:,} folders, {len(faults)} faults, {time.monotonic() - started:.0f} s")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
