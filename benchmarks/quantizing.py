"""`qcli quantize` of a checkpoint of 1 GB with every method that needs no texts, beside a copy of it, in one run.

    python benchmarks/quantizing.py [--folder FOLDER] [--rounds N] [--only WORDS]

The checkpoint is a Llama with random bfloat16 weights, of which three quarters are linear layers that are quantized. FOLDER (3 GB,
a temporary one by default) holds it and what is written. A copy reads the files and writes them with as many syncs as quantize. The
commands run in this process and in turn, and the figures are medians. What takes more than a minute is run once. Prints seconds,
the processor's seconds and the ratio to the copy, and writes benchmarks/results/quantizing-NAME.json.
"""

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from make_checkpoint import make_checkpoint  # noqa: E402
from measure import machine  # noqa: E402
from rows import Row, save, show  # noqa: E402

import qcli  # noqa: E402
from qcli import console  # noqa: E402
from qcli.quantization.shard_files import SYNC_BYTES  # noqa: E402

LONG = 60.0  # seconds; what takes longer is run once
SHAPE = {"layers": 6, "hidden": 2048, "intermediate": 8192, "vocabulary": 32000, "heads": 32, "kv_heads": 8}
CT = "compressed-tensors"

# Name to (method, format, settings), and the most that it may take of a copy's time.
FORMS: dict[str, tuple[str, str | None, dict[str, object], float | None]] = {
    "nf4": ("nf4", None, {}, 1.5),
    "fp4": ("fp4", None, {}, 1.5),
    "llm-int8": ("llm-int8", None, {}, 1.5),
    "int8": ("int8", CT, {}, 1.5),
    "fp8, rows": ("fp8", CT, {}, 1.5),
    "fp8, blocks": ("fp8", CT, {"share": "block"}, 1.5),
    "fp8, tensor": ("fp8", CT, {"share": "tensor"}, 1.5),
    "mxfp4": ("mxfp4", CT, {}, 1.5),
    "nvfp4": ("nvfp4", CT, {}, 1.5),
    "rtn": ("rtn", CT, {}, 1.5),
    "rtn, zero points": ("rtn", CT, {"zero_point": True}, 1.5),
    "rtn, 3 bits": ("rtn", CT, {"bits": 3}, 1.5),
    "rtn, gptq": ("rtn", "gptq", {}, 1.5),
    "rtn, awq": ("rtn", "awq", {"zero_point": True}, 1.5),
    "nf3": ("nf3", None, {}, 1.5),
    "rtn --search mse": ("rtn", CT, {"search": "mse"}, 10),
    "nf4 --search mse": ("nf4", None, {"search": "mse"}, 10),
    "nf3 --search mse": ("nf3", None, {"search": "mse"}, 10),
    "hqq": ("hqq", CT, {}, 10),
    "hqq, awq": ("hqq", "awq", {}, 10),
    "kmeans": ("kmeans", None, {}, 10),
}


def copy(source: Path, output: Path) -> None:
    """Reads each file and writes it, with as many syncs as `qcli quantize`."""
    output.mkdir()
    buffer = memoryview(bytearray(1 << 20))
    for file in source.iterdir():
        with open(file, "rb", buffering=0) as read, open(output / file.name, "wb", buffering=0) as written:
            unsynced = 0
            while count := read.readinto(buffer):
                unsynced += written.write(buffer[:count])
                if unsynced >= SYNC_BYTES:
                    os.fdatasync(written.fileno())
                    unsynced = 0
            os.fdatasync(written.fileno())


def timed(run: Callable[[], object], output: Path) -> tuple[float, float]:
    """(seconds, the processor's seconds) of writing into `output`, which is deleted before and after."""
    for left in (output, output.with_name(f"{output.name}.partial")):  # of a run that was stopped
        shutil.rmtree(left, ignore_errors=True)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    run()
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    shutil.rmtree(output)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(folder: Path, names: list[str], rounds: int) -> list[Row]:
    """A row for each form, and the copy's in each."""
    source, output = folder / "model", folder / "out"
    if not source.exists():
        make_checkpoint(source, shard_size=5 * 10**9, **SHAPE)
    runs: dict[str, Callable[[], object]] = {"copy": partial(copy, source, output)}
    for name in names:
        method, format, settings, _ = FORMS[name]
        runs[name] = partial(qcli.quantize, str(source), output, method=method, format=format, settings=settings)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            if times[name] and times[name][0][0] > LONG:
                continue
            times[name].append(timed(run, output))
            console.say(f"{name}: {times[name][-1][0]:.2f} s")
    found = {name: [statistics.median(column) for column in zip(*each)] for name, each in times.items()}
    rows = []
    for name in names:
        (copied, copied_cpu), (wall, used) = found["copy"], found[name]
        row = Row(f"quantize, {name}", {"copy": copied, "qcli": wall, "copy, CPU": copied_cpu, "qcli, CPU": used})
        rows.append(row.compare("time / copy", wall / copied, FORMS[name][3], at_most=True))
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; a temporary one by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="forms that begin with one of these words, separated by commas; not saved")
    options = parser.parse_args()
    names = [name for name in FORMS if name.startswith(tuple(options.only.split(",")))]
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(options.folder or Path(temporary), names, options.rounds)
    show(rows, "seconds")
    if not options.only:
        result = {"machine": machine(), "load_before": before, "rows": [asdict(row) for row in rows]}
        console.out(f"wrote {save('quantizing', str(result['machine']['cpu']), result)}")


if __name__ == "__main__":
    main()
