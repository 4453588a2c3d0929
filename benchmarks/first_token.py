"""What a start costs: the time until a command shows something, each run in a process of its own.

    python benchmarks/first_token.py MODEL [--repeat N] [--beside CHECKOUT] [--only WORDS]

MODEL is the folder of an unquantized model, such as SmolLM2-135M. It is quantized to NF4 and LLM.int8() in a temporary folder
first. Then these are measured in turn, N times each: `generate` up to its first and to its second token (the moment at which
their text arrives at the other end of a pipe), of MODEL and of both quantized forms; and, from start to end, `quantize`, `quantize
--dry-run`, `doctor`, `info`, `estimate-memory`, `--help` and a folder that is not there. With --beside, another checkout of qcli
runs every command too, right after this one: pairs of runs show a difference on a machine whose speed varies. Its kernels must be
built. A run before the first is not counted, so files are in the system's cache.

Prints medians and the best, and the versions. CPU is user and system seconds of all threads, the median.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qcli import console  # noqa: E402
from qcli.doctor import cpu_name  # noqa: E402
from qcli.errors import QcliError  # noqa: E402

PROMPT = "Once upon a time"


def commands(model: Path, scratch: Path) -> dict[str, tuple[list[str], int]]:
    """The name shown -> qcli's arguments, and the exit status that it must have."""
    made = {"NF4": str(scratch / "nf4"), "LLM.int8()": str(scratch / "int8")}
    generating = [PROMPT, "--temperature", "0", "--max-new-tokens", "2"]
    name, out = str(model), str(scratch / "out")
    return {
        "generate, unquantized": (["generate", name, *generating], 0),
        **{f"generate, {form}": (["generate", folder, *generating], 0) for form, folder in made.items()},
        "quantize": (["quantize", name, "--output", out, "--overwrite"], 0),
        "quantize --dry-run": (["quantize", name, "--output", out, "--overwrite", "--dry-run"], 0),
        "doctor": (["doctor"], 0),
        "info": (["info", name], 0),
        "estimate-memory": (["estimate-memory", name], 0),
        "--help": (["--help"], 0),
        "generate, no such folder": (["generate", str(scratch / "none/such/model"), PROMPT], 1),
    }


def run(arguments: list[str], expected: int, tree: Path) -> dict[str, float]:
    """Seconds of `qcli ARGUMENTS` from the code in `tree`: to the first and the second piece of its output, and to its end.

    Raises QcliError if it ends with another status than `expected`.
    """
    environment = os.environ | {"PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "qcli", *arguments]
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=errors)
        pieces = []
        while os.read(process.stdout.fileno(), 1 << 16):
            pieces.append(time.perf_counter() - started)
        _, status, used = os.wait4(process.pid, 0)
        whole = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stdout.close()
        if process.returncode != expected:
            errors.seek(0)
            raise QcliError(f"qcli {' '.join(arguments)} ended with {process.returncode}", errors.read().decode())
    found = {"whole": whole, "CPU": used.ru_utime + used.ru_stime}
    if arguments[0] == "generate" and pieces:
        found |= {"first token": pieces[0], "second token": pieces[min(1, len(pieces) - 1)]}
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the folder of an unquantized model")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="another checkout of qcli, to compare with")
    parser.add_argument("--only", default="", help="commands that begin with one of these words, separated by commas")
    options = parser.parse_args()
    trees = {"here": ROOT} | ({"beside": options.beside.resolve()} if options.beside else {})
    kept = tuple(options.only.split(","))
    times: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model.resolve()
        for name, method in (("nf4", "nf4"), ("int8", "llm-int8")):
            if any(command.startswith(kept) for command in ("generate, NF4", "generate, LLM.int8()")):
                run(["quantize", str(model), "--method", method, "--output", str(Path(scratch) / name)], 0, ROOT)
        asked = {name: each for name, each in commands(model, Path(scratch)).items() if name.startswith(kept)}
        for turn in range(options.repeat + 1):
            console.say(f"round {turn} of {options.repeat}")
            for name, (arguments, expected) in asked.items():
                for tree, folder in trees.items():
                    for what, seconds in run(arguments, expected, folder).items() if turn else ():
                        times.setdefault((name, what, tree), []).append(seconds)
    rows = []
    for name, what in dict.fromkeys((name, what) for name, what, _ in times if what != "CPU"):
        row = [name, what]
        for tree in trees:
            found = times[name, what, tree]
            row += [f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{statistics.median(times[name, 'CPU', tree]):.2f}"]
        if options.beside:
            pairs = [mine / other for mine, other in zip(times[name, what, "here"], times[name, what, "beside"])]
            row.append(f"{statistics.median(pairs):.2f}")
        rows.append(tuple(row))
    heads = [f"{tree}: {word}" for tree in trees for word in ("median s", "best s", "CPU s")]
    console.table("", ("command", "until", *heads, *(["here / beside"] if options.beside else [])), rows, left=(0, 1))
    console.out(f"{options.repeat} runs; {cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    console.out(", ".join(f"{package} {_version(package)}" for package in ("torch", "transformers", "tokenizers", "typer")))
    console.out(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


if __name__ == "__main__":
    main()
