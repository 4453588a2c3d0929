"""How long a cluster takes for the largest models, from 1 to 256 machines: a simulation with rates that are measured here.

    python benchmarks/cluster_scaling.py --folder FOLDER [--threads-of-a-machine 16] [--network 1.25GB] [--store 5GB,20GB,80GB]

FOLDER gets a random checkpoint of 2 GB, of which files are quantized as a worker does it, and the sparse checkpoints of
benchmarks/sparse_checkpoints.py, whose plans are made from headers. Measured are the seconds and the peak memory of a plan, what a
thread quantizes in a second (from the page cache), and what a worker costs before its first file and for each one.

The model: machines take files as `quantize --cluster` deals them, the largest first. A machine reads, computes and writes at the
same time, so a file takes as long as the slowest of the three. All share the store, which gives each of the machines at work an
equal part. The network is that of a machine.

Writes benchmarks/results/cluster-scaling-CPU.json and docs/images/cluster-scaling.svg.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.make_checkpoint import make_checkpoint  # noqa: E402
from benchmarks.measure import machine  # noqa: E402
from benchmarks.rows import save  # noqa: E402
from benchmarks.sparse_checkpoints import SHAPES, write  # noqa: E402
from qcli import console  # noqa: E402
from qcli.cluster.jobs import Told  # noqa: E402
from qcli.files.figure import figure  # noqa: E402
from qcli.quantization.division import division  # noqa: E402
from qcli.quantization.on_cluster import ShardJob, specification  # noqa: E402
from qcli.quantization.quantize import make_plan  # noqa: E402
from qcli.quantization.staging import Staging  # noqa: E402
from qcli.sizes import format_bytes, format_seconds, parse_size  # noqa: E402

MACHINES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
PLAN = """
import sys, time, json
started = time.monotonic()
from qcli.process import peak_memory
from qcli.quantization.quantize import make_plan
plan = make_plan(sys.argv[1], sys.argv[2], bits=4, settings={"max_shard_size": sys.argv[3]})
print(json.dumps({"seconds": time.monotonic() - started, "peak_bytes": peak_memory(), "problems": plan.problems}))
"""


def seconds_of(files: list[tuple[int, int]], machines: int, compute: float, network: float, store: float, cost: float) -> float:
    """When the last of the files, (bytes read, bytes written) in the order in which they are dealt, is done. Rates are bytes a
    second: source bytes that a machine computes, what its network carries, what the store gives and takes in all. `cost` is seconds
    a file."""
    left, now = list(reversed(files)), 0.0
    at_work: list[list[float]] = []  # seconds until it begins, share that is left, bytes read, bytes moved
    while left or at_work:
        while left and len(at_work) < machines:
            read, written = left.pop()
            at_work.append([cost, 1.0, read, read + written])
        moving = sum(waiting == 0 for waiting, *_ in at_work)
        rates = [min(compute / read, network / moved, store / max(moving, 1) / moved) for _, _, read, moved in at_work]
        step = min(waiting or share / rate for (waiting, share, *_), rate in zip(at_work, rates))
        now += step
        for each, rate in zip(at_work, rates):
            if each[0]:
                each[0] = max(each[0] - step, 0.0) if each[0] > step + 1e-9 else 0.0
            else:
                each[1] -= rate * step
        at_work = [each for each in at_work if each[0] or each[1] > 1e-9]
    return now


def measured(folder: Path) -> dict[str, float]:
    """What a thread quantizes in a second, and what a file and a worker's start cost, as ShardJob does it in this process."""
    model = folder / "random-2gb"
    if not model.exists():
        make_checkpoint(
            model, layers=4, hidden=4096, intermediate=14336, vocabulary=32000, heads=32, kv_heads=8, shard_size=5_000_000_000
        )
    with tempfile.TemporaryDirectory(dir=folder) as work:
        plan = make_plan(str(model), Path(work) / "out", bits=4, settings={"max_shard_size": "100MB"})
        with Staging(plan) as staging:
            torch.set_num_threads(1)
            job = ShardJob(specification(plan, staging.folder, "cpu", None))
            times = []
            for file, works in division(plan, range(len(plan.work))):
                started = time.perf_counter()
                job.shard(Told(0), file, [w.index for w in works])
                times.append((sum(w.info.nbytes for w in works), time.perf_counter() - started))
    times = times[1:]  # the first warms up
    # seconds = cost + bytes / rate, by least squares
    n, xs, ys = len(times), [x for x, _ in times], [y for _, y in times]
    mx, my = sum(xs) / n, sum(ys) / n
    slope = sum((x - mx) * (y - my) for x, y in times) / max(sum((x - mx) ** 2 for x in xs), 1)
    through = sum(ys) / sum(xs)  # where files are alike, their slope says nothing
    rate = 1 / (slope if 0.5 * through < slope < 2 * through else through)
    return {"bytes_a_second_and_thread": rate, "seconds_a_file": max(my - mx / rate, 0.0), "files": n}


def planned(folder: Path, name: str, shard: str) -> tuple[dict, list[tuple[int, int]]]:
    """(seconds and memory of the plan in a process of its own, the files as they are dealt)."""
    model = folder / name
    if not model.exists():
        write(model, *SHAPES[name]())
    done = subprocess.run(
        [sys.executable, "-c", PLAN, str(model), str(folder / "never"), shard], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    del found["problems"]  # the disk of this machine
    plan = make_plan(str(model), folder / "never", bits=4, settings={"max_shard_size": shard})
    files = [
        (sum(w.info.nbytes for w in works), sum(w.output_bytes for w in works))
        for _, works in division(plan, range(len(plan.work)))
    ]
    sizes = [shard.size for shard in plan.shards]
    found |= {"tensors": len(plan.work), "files": len(files), "largest_over_mean": max(sizes) * len(sizes) / sum(sizes)}
    return found, files


def draw(curves: list[dict], path: Path) -> None:
    """A panel for each model, a line for each size of files and store."""
    with figure(path, 9, 4) as made:
        for number, name in enumerate(dict.fromkeys(curve["model"] for curve in curves), 1):
            axes = made.add_subplot(1, 2, number)
            for curve in curves:
                if curve["model"] == name:
                    line = "-" if curve["max_shard_size"] == "1GB" else "--"
                    label = f"{curve['store']}/s, files of {curve['max_shard_size']}"
                    axes.plot(MACHINES, [seconds / 60 for seconds in curve["seconds"]], line, label=label)
            axes.set(xscale="log", yscale="log", title=name, xlabel="machines", ylabel="minutes")
            axes.set_xticks(MACHINES, labels=[str(n) for n in MACHINES])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        made.axes[0].legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads-of-a-machine", type=int, default=16)
    parser.add_argument("--network", default="1.25GB", help="bytes a second of a machine")
    parser.add_argument("--store", default="5GB,20GB,80GB", help="bytes a second that all machines share")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rates = measured(args.folder)
    compute, network = rates["bytes_a_second_and_thread"] * args.threads_of_a_machine, parse_size(args.network)
    console.out(
        f"a thread quantizes {format_bytes(rates['bytes_a_second_and_thread'])}/s; a file costs {rates['seconds_a_file']:.3f} s"
    )
    plans, curves = [], []
    for name in ("llama-405b", "deepseek-v3"):
        for shard in ("5GB", "1GB"):
            about, files = planned(args.folder, name, shard)
            plans.append({"model": name, "max_shard_size": shard, **about})
            console.out(f"{name}, files of {shard}: plan in {about['seconds']:.1f} s and {format_bytes(about['peak_bytes'])}")
            for store in args.store.split(","):
                times = [seconds_of(files, n, compute, network, parse_size(store), rates["seconds_a_file"]) for n in MACHINES]
                curves.append({"model": name, "max_shard_size": shard, "store": store, "seconds": times})
    rows = [
        (f"{c['model']}, files of {c['max_shard_size']}, store of {c['store']}/s", *map(format_seconds, c["seconds"]))
        for c in curves
    ]
    console.table("", ("", *map(str, MACHINES)), rows)
    about = machine("ray")
    settings = {"threads_of_a_machine": args.threads_of_a_machine, "network": args.network, "machines": MACHINES}
    path = save("cluster-scaling", about["cpu"], {"machine": about, "rates": rates, **settings, "plans": plans, "curves": curves})
    draw(curves, ROOT / "docs/images/cluster-scaling.svg")
    console.out(f"wrote {path}")


if __name__ == "__main__":
    main()
