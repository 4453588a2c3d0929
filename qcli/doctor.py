"""What this machine has, what qcli will use of it, and the command that adds each missing part."""

import os
import platform
import shutil
import subprocess
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from qcli import __version__
from qcli.sizes import format_bytes


@dataclass(frozen=True)
class Finding:
    """`value` is what was found. `advice` is what to do if something is missing."""

    name: str
    value: str
    advice: str | None = None


def examine() -> list[Finding]:
    """Examines CPU, memory, libraries and GPU. Takes about a second, mostly to measure memory bandwidth."""
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
        kernels = Finding("CPU kernels", f"{cpu.problem()}; plain torch runs instead, many times slower", advice)
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
    """The processor's own name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _bandwidth() -> float:
    """Bytes per second of a product of a 512 MiB float32 matrix with a vector: the best of five."""
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
    for name, written in (("bitsandbytes", "nf4, fp4 and llm-int8"), ("compressed-tensors", "rtn")):
        version = _version(name)
        absent = f"not installed: qcli does not need it; transformers needs it to load the folders that qcli writes with {written}"
        found.append(Finding(name, version or absent, None if version else f"pip install {name}"))
    return found


def _nvidia() -> list[str]:
    """A line for each GPU that the driver reports: name, driver, memory."""
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

    from qcli.runtime import nvcc, problems

    found = [Finding("NVIDIA GPU", gpu) for gpu in gpus]
    if not gpus:
        found.append(Finding("NVIDIA GPU", "none reported by its driver: everything runs on the CPU"))
    elif torch.version.cuda is None:
        found.append(Finding("GPU in torch", f"torch {torch.__version__} was built without CUDA", problems.TORCH))
    elif not torch.cuda.is_available():
        advice = f"update the driver to one for CUDA {torch.version.cuda}, or install a torch for an older CUDA"
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            advice = "unset CUDA_VISIBLE_DEVICES"
        found.append(Finding("GPU in torch", f"torch for CUDA {torch.version.cuda} finds none", advice))
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    pycuda, unused = _version("pycuda"), "not installed, and not needed without a GPU"
    found.append(_nvcc(devices) if gpus or nvcc.find() else Finding("nvcc", unused))
    advice = problems.PYCUDA if gpus and not pycuda else None
    found.append(Finding("PyCUDA", pycuda or ("not installed" if gpus else unused), advice))
    return found + _cuda_kernels(devices, {entry.advice for entry in found})


def _nvcc(devices: list) -> Finding:
    import torch

    from qcli.errors import KernelError
    from qcli.runtime import nvcc, problems

    compiler = nvcc.find()
    try:
        if compiler:
            return Finding("nvcc", f"{nvcc.version(compiler)}, {compiler}")
    except KernelError as e:
        return Finding("nvcc", e.message, e.hint)
    if devices and all(nvcc.complete(torch.cuda.get_device_capability(device)) for device in devices):
        return Finding("nvcc", "not installed, and not needed: qcli was installed with compiled CUDA kernels")
    return Finding("nvcc", "not installed", problems.NVCC)


def _cuda_kernels(devices: list, given: set[str | None]) -> list[Finding]:
    """Whether kernels run on each GPU of torch. Advice that is in `given` is not repeated."""
    from qcli.runtime import cuda

    found = []
    for device in devices:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the finding says the same
            problem = cuda.problem(device)
        value = f"not on {device}: {problem}; plain torch runs instead, more slowly" if problem else f"on {device}"
        found.append(Finding("CUDA kernels", value, problem.hint if problem and problem.hint not in given else None))
    return found
