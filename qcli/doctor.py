"""What this machine has and what qcli will use of it; for each missing thing, the command that adds it."""

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from qcli import __version__
from qcli.sizes import format_bytes


@dataclass(frozen=True)
class Finding:
    """`value` is what was found; `advice` is what to do where something is missing."""

    name: str
    value: str
    advice: str | None = None


def examine() -> list[Finding]:
    """Looks at CPU, memory, libraries and GPU. Takes about a second, most of it to measure memory bandwidth."""
    return [
        Finding("qcli", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"),
        *_cpu(),
        *_libraries(),
        *_cuda(_nvidia()),
    ]


def _cpu() -> list[Finding]:
    import torch

    from qcli.runtime import cpu

    kernels = Finding("CPU kernels", f"{cpu.variant()} (of {', '.join(cpu.variants())})")
    if cpu.problem():
        again = "qcli again: pip install --force-reinstall --no-deps ."
        if os.environ.get(cpu.OTHER):
            advice = f"unset {cpu.OTHER}"
        elif cpu.path():
            advice = f"install {again}"
        else:
            advice = f"install g++ or clang++ (apt install g++) and then {again}"
        kernels = Finding("CPU kernels", f"{cpu.problem()}; plain torch serves, many times slower", advice)
    elif cpu.variant() is None:
        kernels = Finding("CPU kernels", f"off: {cpu.CHOICE}={cpu.REFERENCE}", f"unset {cpu.CHOICE}")
    threads = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [
        Finding("CPU", f"{cpu_name()}, {cores} cores"),
        kernels,
        Finding("threads", f"{threads}", None if threads == cores else f"OMP_NUM_THREADS={cores} would use every core"),
        Finding(
            "memory",
            f"{format_bytes(total)}, read at {_bandwidth() / 1e9:.1f} GB/s by {threads} thread{'s' if threads > 1 else ''}",
        ),
    ]


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _bandwidth() -> float:
    """Bytes per second of a product of a float32 matrix of 512 MiB and a vector: the best of five."""
    import torch

    matrix, vector = torch.ones(1 << 14, 1 << 13), torch.ones(1 << 13)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        matrix @ vector
        best = min(best, time.perf_counter() - started)
    return matrix.nbytes / best


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _libraries() -> list[Finding]:
    import torch

    found = [
        Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        Finding("transformers", _version("transformers") or "missing"),
    ]
    bitsandbytes = _version("bitsandbytes")
    advice = None if bitsandbytes else "pip install bitsandbytes"
    absent = "not installed: qcli does without; transformers and PEFT need it to load what qcli writes"
    return [*found, Finding("bitsandbytes", bitsandbytes or absent, advice)]


def _nvidia() -> list[str]:
    """A line for each GPU that the driver knows: name, driver, memory."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def _cuda(gpus: list[str]) -> list[Finding]:
    import torch

    found = [Finding("NVIDIA GPU", gpu) for gpu in gpus]
    if not gpus:
        found.append(Finding("NVIDIA GPU", "none that its driver knows: everything runs on the CPU"))
    elif not torch.cuda.is_available():
        built = (
            f"torch {torch.__version__} was built without CUDA" if torch.version.cuda is None else "torch finds none"
        )
        found.append(Finding("GPU in torch", built, "install a CUDA build of torch: https://pytorch.org/get-started"))
    for name, value, advice in (
        ("nvcc", shutil.which("nvcc"), "install the CUDA toolkit and put its bin folder on PATH"),
        ("PyCUDA", _version("pycuda"), "pip install 'qcli[cuda]'"),
    ):
        absent = "not installed" if gpus else "not installed, and of no use without a GPU"
        found.append(Finding(name, value or absent, advice if gpus and not value else None))
    return found
