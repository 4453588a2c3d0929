"""qcli on an NVIDIA GPU compared with torch in bfloat16 and bitsandbytes: `make bench-gpu`, or

    python benchmarks/gpu.py [--only ops,nf4,few,many,launch,generate] [--folder FOLDER] [--output FILE] [--stand-in]

The GPU's limits are measured first, and fractions refer to them. Times are medians of rounds in turn. A round is a replay of a
CUDA graph of calls over copies of the weights, which together exceed twice the L2 cache. Calls that cannot be captured are timed
by events around calls from Python, and marked "eager". FOLDER (13 GB, created if missing) holds the random checkpoint.
Prints each part as soon as it is finished, and a table at the end. Writes FILE after each part, and
benchmarks/results/cuda-DEVICE.json if all parts ran. If a part fails, the error is shown and the other parts run.
With --stand-in the benchmark runs on a CPU, with small sizes and emulated kernels. Its figures then mean nothing.
"""

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import gpu_int8  # noqa: E402
import gpu_linears  # noqa: E402
import gpu_models  # noqa: E402
import gpu_ops  # noqa: E402
from gpu_timing import Gpu, StandIn  # noqa: E402
from measure import machine  # noqa: E402
from rows import Row, save, show, show_ratios  # noqa: E402

from qcli import console  # noqa: E402
from qcli.runtime import cuda, nvcc  # noqa: E402

PARTS = ("ops", "nf4", "few", "many", "launch", "generate")
STATE = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--folder", type=Path, help="where the checkpoint is; a temporary one by default")
    parser.add_argument("--output", type=Path, help="a file for the figures of the parts that ran")
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {','.join(PARTS)}")
    logging.disable(logging.WARNING)  # bitsandbytes warns about casts at every call
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        gpu = StandIn(temporary / "kernels") if options.stand_in else the_gpu()
        with torch.inference_mode():
            result = measure(gpu, parts, options.folder or temporary, options.output)
    if result["failed"]:
        sys.exit(f"error: {', '.join(result['failed'])} failed")
    if set(parts) == set(PARTS) and not gpu.tiny:
        console.out(f"wrote {save('cuda', str(result['machine']['gpu']), result)}")


def the_gpu() -> Gpu:
    """The first GPU, with its kernels compiled."""
    from tests.gpu.checks import compile_all

    if not torch.cuda.is_available():
        sys.exit("error: torch sees no CUDA GPU; --stand-in shows whether the scripts run")
    if problem := cuda.problem(torch.device("cuda", 0)):
        sys.exit(f"error: {problem.message}; {problem.hint}")
    started = time.perf_counter()
    count = compile_all(torch.cuda.get_device_capability(0), {})
    console.out(f"{count} images of the kernels in {time.perf_counter() - started:.0f} s")
    return Gpu()


def measure(gpu, parts: list[str], folder: Path, output: Path | None = None) -> dict[str, object]:
    """Runs the parts. Returns the results to keep."""
    torch.manual_seed(0)
    began = time.perf_counter()
    limits, rows = gpu_ops.ceilings(gpu)
    found = {"machine": {**of_gpu(gpu), **machine("pycuda")}, "ceilings": limits, "rows": [], "seconds": {}}
    found["failed"] = []
    keep(found, "ceilings", [("ceiling", row) for row in rows], began)
    runs = {
        "ops": lambda: gpu_ops.run(gpu, limits),
        "nf4": lambda: gpu_linears.nf4(gpu, limits),
        "few": lambda: gpu_linears.int8(gpu, limits),
        "many": lambda: gpu_int8.run(gpu, limits),
        "launch": launch_cost,
        "generate": lambda: gpu_models.run(gpu, limits, folder),
    }
    kept = []
    for part in PARTS:
        if part in parts:
            began, rows = time.perf_counter(), []
            try:
                for row in runs[part]():
                    rows.append(row)
            except Exception:  # the figures of the other parts must not be lost
                traceback.print_exc()
                found["failed"].append(part)
            kept += keep(found, part, rows, began)
            gpu.free()
            if output:
                output.write_text(json.dumps(found, indent=2) + "\n")
    console.out("\nratios that are required, or aimed at")
    show_ratios([(row, ratio) for row in kept for ratio in row.ratios if ratio["must"] or ratio["aim"]])
    return found


def keep(found: dict, part: str, rows: list[tuple[str, Row]], began: float) -> list[Row]:
    """Shows the rows of a part, one table per unit, and records them."""
    for unit, some in groupby(rows, key=lambda pair: pair[0]):
        some = [row for _, row in some]
        show(some, unit)
        found["rows"] += [{"part": part, "unit": unit, **asdict(row)} for row in some]
    found["seconds"][part] = time.perf_counter() - began
    console.out(f"({part}: {found['seconds'][part]:.0f} s)")
    return [row for _, row in rows]


def launch_cost() -> Iterator[tuple[str, Row]]:
    """The results of benchmarks/cuda_launch.py, in a process of its own."""
    if find_spec("pycuda") is None:
        console.out("no PyCUDA here: launches are not measured")
        return
    script = Path(__file__).with_name("cuda_launch.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    lines = re.findall(r"^ *([\d.]+)  (.+)$", done.stdout, re.MULTILINE)
    yield "microseconds of the host", Row("launch", {name: float(value) for value, name in lines})


def of_gpu(gpu) -> dict[str, object]:
    """The GPU, its state under load, and every version."""
    if gpu.tiny:
        return {"gpu": "stand-in"}
    properties = torch.cuda.get_device_properties(gpu.device)
    a = torch.randn(8192, 8192, device=gpu.device).bfloat16()
    for _ in range(1000):  # about a second of work, while nvidia-smi reads the state
        a @ a
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        state = dict(zip(STATE, done.stdout.strip().split(", ")))
    except (OSError, subprocess.CalledProcessError) as e:
        state = {"nvidia-smi": str(e)}
    torch.cuda.synchronize()
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "at_work": state,
        "cuda": torch.version.cuda,
        "nvcc": nvcc.version(nvcc.find()) if nvcc.find() else None,
    }


if __name__ == "__main__":
    main()
