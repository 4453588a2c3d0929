"""Every verb on a machine that other processes use too: alone, beside one busy process, beside two.

    python benchmarks/busy.py [--model FOLDER] [--rounds N] [--only WORDS]

Runs on the demo model, and on FOLDER with fewer tokens. With a model of 135 million parameters this takes some ten minutes on two
cores. A busy process is `python -c "while True: pass"`. Each command is a process of its own. It runs alone and beside the busy
processes, in turn. Prints seconds and writes benchmarks/results/busy-NAME.json.

What to expect: Linux gives each of R runnable threads on n cores n / R of a core, at most one. qcli keeps one thread for each free
core, and at least half of n. Beside b busy processes its t threads have min(t, t n / (t + b)) of the n cores that it had alone.
Perfectly parallel work takes n divided by that: on two cores 2 times as long beside one process, 3 times beside two. Work on one
thread takes 1 and 1.5 times as long.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measure import machine  # noqa: E402
from rows import Row, save, show  # noqa: E402

from qcli import console  # noqa: E402
from qcli.errors import QcliError  # noqa: E402
from qcli.runtime.threads import cores  # noqa: E402

ROOT = Path(__file__).parent.parent
STORIES = ROOT / "examples/stories.jsonl"
BUSY = (0, 1, 2)
NOISE = 1.1  # factor by which a time varies on a quiet machine


def commands(model: Path, scratch: Path, text: list[str], new: int) -> dict[str, list[str]]:
    """The name shown -> qcli's arguments. The first two commands write the quantized folders that the others read."""
    nf4, int8 = str(scratch / f"{model.name}-nf4"), str(scratch / f"{model.name}-int8")
    reading = ["--text", str(STORIES), *text]
    generating = ["Once upon a time", "--max-new-tokens", str(new)]
    name = str(model)
    return {
        "quantize --bits 4": ["quantize", name, "--bits", "4", "--output", nf4, "--overwrite"],
        "quantize --bits 8": ["quantize", name, "--bits", "8", "--output", int8, "--overwrite"],
        "generate": ["generate", name, *generating],
        "generate, NF4": ["generate", nf4, *generating],
        "generate, LLM.int8()": ["generate", int8, *generating],
        "evaluate --methods all": ["evaluate", name, *reading, "--methods", "all"],
        "inspect-outliers --ablate": ["inspect-outliers", name, *reading, "--ablate"],
        "estimate-memory": ["estimate-memory", name, "--gpu", "24GB"],
        "info": ["info", name],
    }


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Runs `count` busy processes while this lasts."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(arguments: list[str]) -> tuple[float, float]:
    """(wall seconds, CPU seconds) of `qcli ARGUMENTS`. Raises QcliError if it fails."""
    started = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-m", "qcli", *arguments], env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - started
        if process.returncode:
            output.seek(0)
            raise QcliError(f"qcli {' '.join(arguments)} ended with {process.returncode}", output.read().decode())
    return wall, used.ru_utime + used.ru_stime


def bound(count: int, most: float) -> float:
    """The factor by which perfectly parallel work may be slower beside `count` busy processes."""
    threads = max(most - count, ceil(most / 2), 1)
    return most / min(threads, threads * most / (threads + count))


def measure(work: str, arguments: list[str], rounds: int) -> Row:
    """Medians alone and beside busy processes, measured in turn, with the ratios."""
    times: dict[int, list[tuple[float, float]]] = {count: [] for count in BUSY}
    for _ in range(rounds):
        for count in BUSY:
            with busy(count):
                times[count].append(run(arguments))
    found = {count: [statistics.median(column) for column in zip(*runs)] for count, runs in times.items()}
    row = Row(work, {_name(count): wall for count, (wall, _) in found.items()})
    row.figures |= {f"{_name(count)}, CPU": used for count, (_, used) in found.items()}
    for count in BUSY[1:]:
        row.compare(f"{_name(count)} / alone", found[count][0] / found[0][0], bound(count, cores()) * NOISE, at_most=True)
    return row


def _name(count: int) -> str:
    return f"beside {count}" if count else "alone"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with another unquantized model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="commands that begin with one of these words, separated by commas; not saved")
    options = parser.parse_args()
    kept = tuple(options.only.split(","))
    rows, before = [], os.getloadavg()
    models = {ROOT / "examples/demo-model": ([], 100)}
    if options.model:
        models[options.model.resolve()] = (["--tokens", "256"], 64)
    with tempfile.TemporaryDirectory() as scratch:
        for model, (text, new) in models.items():
            for work, arguments in commands(model, Path(scratch), text, new).items():
                if work.startswith(kept) or work.startswith("quantize"):  # the others read what it writes
                    console.say(f"{model.name}: {work}")
                    rows.append(measure(f"{model.name}: {work}", arguments, options.rounds))
    show(rows, "seconds")
    if not options.only:
        result = {"machine": machine(), "load_before": before, "rows": [asdict(row) for row in rows]}
        console.out(f"wrote {save('busy', str(result['machine']['cpu']), result)}")


if __name__ == "__main__":
    main()
