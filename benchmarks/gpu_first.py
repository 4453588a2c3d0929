"""Checks and measurements for half an hour on a GPU without a network: `make gpu-first`, or

    python benchmarks/gpu_first.py [--output FOLDER] [--from STEP | --only STEP,STEP] [--minutes N] [--wheels FOLDER]

The most important steps come first. Each has a time limit, after which it is ended with all processes that it started. The first
wrong number ends the run. FOLDER (by default build/gpu-first) receives a log of each step, the figures of the benchmark and of the
profiler, and summary.json, each as soon as it is known. Compiled kernels are kept there too, for the next call. With --minutes a
step does not begin if it might not end in time; --from continues later. With --wheels the wheels in a folder are installed first.
summary.json contains device, driver and versions, and can be kept in benchmarks/results/.
"""

import argparse
import csv
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.gpu import sanitizer  # noqa: E402

PACKAGES = ("torch", "transformers", "bitsandbytes", "pycuda", "numpy", "qcli")
STATE = ("name", "driver_version", "compute_cap", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")
PASSED, WRONG, FAILED, LATE, SKIPPED = "passed", "wrong", "failed", "out of time", "skipped"

Figures = dict[str, object]


@dataclass(frozen=True)
class Step:
    """A step of the run. `command` gives its command line for the output FOLDER, `seconds` is its time limit. If a step that
    `proves` something fails, the run ends. A `vital` step also ends the run if it is late. Without the program `needs` the step is
    skipped. `read` gets the log and FOLDER, and returns figures for the summary. It raises ValueError if the step did not do its
    work."""

    name: str
    command: Callable[[Path], list[str]]
    seconds: int
    proves: bool = False
    vital: bool = False
    needs: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[str, Path], Figures] = lambda log, folder: {}


def tests_passed(log: str, folder: Path) -> Figures:
    """The counts in pytest's last line, which other output may follow. Raises ValueError if no test ran."""
    ends = re.findall(r"^=*\s*(\d+ \w+.* in [\d.]+s.*)$", log, re.MULTILINE)
    counts = re.findall(r"\b(\d+) (passed|failed|skipped|errors?)\b", ends[-1] if ends else "")
    found: Figures = {what: int(number) for number, what in counts}
    if not found.get("passed"):
        raise ValueError("no test ran")
    return found


def benchmark(name: str) -> Callable[[str, Path], Figures]:
    """The figures that benchmarks/gpu.py wrote."""

    def read(log: str, folder: Path) -> Figures:
        found = json.loads((folder / f"{name}.json").read_text())
        return {key: found[key] for key in ("ceilings", "rows", "seconds", "failed")}

    return read


def profile(log: str, folder: Path) -> Figures:
    """What ncu reports about each launch of a product."""
    lines = (folder / "ncu.csv").read_text().splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        raise ValueError("ncu.csv has no table")
    launches: dict[str, Figures] = {}
    for row in csv.DictReader(lines[begin:]):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"].partition("(")[0]})
        launch[f"{row['Metric Name']} [{row['Metric Unit']}]"] = row["Metric Value"]
    return {"launches": list(launches.values())}


def python(*words: str) -> Callable[[Path], list[str]]:
    """A command of this Python. FOLDER in a word stands for the output folder."""
    return lambda folder: [sys.executable, *(word.replace("FOLDER", str(folder)) for word in words)]


def pytest(*words: str) -> Callable[[Path], list[str]]:
    """Tests that need a GPU, up to the first failure."""
    return python("-m", "pytest", "-q", "-x", "-m", "not slow", "--durations=10", *words)


def sanitized(tool: str, proves: bool) -> Step:
    """Every kernel under a tool of compute-sanitizer."""
    return Step(
        tool,
        lambda folder: sanitizer.command(tool, sys.executable),
        sanitizer.SECONDS,
        proves,
        needs="compute-sanitizer",
        environment=sanitizer.ENVIRONMENT,
    )


NCU = "--target-processes all --kernel-name regex:^linear_ --section SpeedOfLight --section Occupancy --section LaunchStats"
SUITE = ("graphs", "streams", "models", "bitsandbytes")
STEPS = (
    Step("doctor", python("-m", "qcli", "doctor"), 60),
    Step("products", python("-m", "tests.gpu.first"), 150, proves=True, vital=True),
    Step("parity", pytest("tests/gpu/test_parity.py", "-k", "not layers"), 300, proves=True, read=tests_passed),
    Step("layers", pytest("tests/gpu/test_parity.py", "-k", "layers"), 300, proves=True, read=tests_passed),
    sanitized("memcheck", proves=True),
    sanitized("racecheck", proves=True),
    Step(
        "suite",
        pytest(*(f"tests/gpu/test_{name}.py" for name in SUITE), "tests/generation/test_decode_cuda.py"),
        300,
        proves=True,
        read=tests_passed,
    ),
    Step(
        "bench-few",
        python("benchmarks/gpu.py", "--only", "ops,nf4,few", "--output", "FOLDER/bench-few.json"),
        420,
        read=benchmark("bench-few"),
    ),
    Step(
        "bench-many",
        python("benchmarks/gpu.py", "--only", "many,launch", "--output", "FOLDER/bench-many.json"),
        300,
        read=benchmark("bench-many"),
    ),
    Step(
        "ncu",
        lambda folder: [
            "ncu",
            *NCU.split(),
            "--csv",
            "--log-file",
            str(folder / "ncu.csv"),
            "--force-overwrite",
            sys.executable,
            "-m",
            "tests.gpu.first",
            "--launch",
        ],
        180,
        needs="ncu",
        read=profile,
    ),
    sanitized("synccheck", proves=True),
    Step("large", pytest("tests/gpu/test_large.py"), 420, proves=True, read=tests_passed),
    sanitized("initcheck", proves=False),  # it also reports torch's own kernels
    Step(
        "generate",
        python("benchmarks/gpu.py", "--only", "generate", "--output", "FOLDER/generate.json"),
        540,
        read=benchmark("generate"),
    ),
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.name for step in STEPS]
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-first")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--from", dest="first", choices=names, metavar="STEP", help=f"one of {', '.join(names)}")
    chosen.add_argument("--only", default="", metavar="STEP,STEP")
    parser.add_argument("--minutes", type=float, help="a step does not begin if it might not end within this time")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to install first")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else names[names.index(options.first or names[0]) :]
    if unknown := set(only) - set(names):
        parser.error(f"--only {','.join(sorted(unknown))}: expected some of {','.join(names)}")
    steps = [step for step in STEPS if step.name in only]
    if options.wheels:
        steps.insert(0, install(options.wheels))
    sys.exit(run(steps, options.output.resolve(), options.minutes))


def install(wheels: Path) -> Step:
    """Installs the wheels of a folder, without a package index."""
    files = sorted(str(path.resolve()) for path in wheels.glob("*.whl"))
    return Step("install", python("-m", "pip", "install", "--no-index", "--no-deps", *files), 120, proves=True, vital=True)


def run(steps: list[Step], folder: Path, minutes: float | None) -> int:
    """Runs the steps in turn. Returns 1 if one was wrong, else 0."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    summary = Summary(folder)
    for step in steps:
        left = 60 * minutes - (time.monotonic() - began) if minutes else step.seconds
        if step.seconds > left:
            print(f"{step.name} may take {step.seconds} s, {max(left, 0):.0f} s are left: go on with --from {step.name}")
            return 0
        print(f"{step.name}: {step.seconds} s at most, {folder / step.name}.log", flush=True)
        note = perform(step, folder)
        summary.add(step, note)
        print(f"  {note['status']} in {note['seconds']:.0f} s{'; ' + note['why'] if 'why' in note else ''}", flush=True)
        if note["status"] == WRONG or step.vital and note["status"] == LATE:
            print(f"stopped: {step.name} must pass before the next steps are useful")
            return 1
    print(f"{folder / 'summary.json'} has all results")
    return 0


def perform(step: Step, folder: Path) -> Figures:
    """Runs one step. Returns its entry of the summary."""
    if step.needs and shutil.which(step.needs) is None:
        return {"status": SKIPPED, "seconds": 0.0, "why": f"{step.needs} is not on PATH"}
    log, began = folder / f"{step.name}.log", time.monotonic()
    environment = {"QCLI_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "QCLI_TEST_SEED": "0"}
    with log.open("wb") as output:
        code = ended(step.command(folder), os.environ | environment | step.environment, step.seconds, output)
    note: Figures = {"status": PASSED, "seconds": round(time.monotonic() - began, 1)}
    text = log.read_text(errors="replace").replace(f"{ROOT}/", "").strip()
    if code is None:
        note |= {"status": LATE, "why": f"not finished within {step.seconds} s"}
    elif code:
        note |= {"status": WRONG if step.proves else FAILED, "why": f"exit code {code}: {(text.splitlines() or [''])[-1]}"}
    try:
        if figures := step.read(text, folder):
            note["figures"] = figures
    except (OSError, ValueError, KeyError, IndexError) as e:  # its figures are missing or incomplete
        if note["status"] == PASSED:
            note |= {"status": WRONG if step.proves else FAILED, "why": str(e)}
    return note


def ended(command: list[str], environment: dict[str, str], seconds: float, output) -> int | None:
    """A command's exit code; None if its time was over. All processes that it started end with it in any case."""
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as e:
        output.write(f"{command[0]}: {e.strerror}\n".encode())
        return 127
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


class Summary:
    """summary.json. Earlier calls may have begun it."""

    def __init__(self, folder: Path):
        self.file = folder / "summary.json"
        self.content: Figures = json.loads(self.file.read_text()) if self.file.exists() else {"steps": {}}
        self.content |= {"machine": machine()}

    def add(self, step: Step, note: Figures) -> None:
        """Records a step and writes the file."""
        steps = self.content["steps"] | {step.name: note | {"gpu": self.content["machine"]["gpu"].get("name")}}
        order = ["install", *(step.name for step in STEPS)]
        self.content["steps"] = dict(sorted(steps.items(), key=lambda item: order.index(item[0])))
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n")
        partial.replace(self.file)


def machine() -> Figures:
    """GPU, driver and every version."""
    packages: Figures = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    state = said(["nvidia-smi", "-i", "0", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"])
    compiler = re.search(r"V(\d+\.\d+\.\d+)", said(["nvcc", "--version"]))
    return {
        "gpu": dict(zip(STATE, state.split(", "))) if state else {},
        "nvcc": compiler[1] if compiler else None,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        **packages,
    }


def said(command: list[str]) -> str:
    """The output of a program; empty if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    main()
