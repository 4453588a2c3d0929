"""Problems that keep CUDA kernels from running: what is wrong, and what to do."""

import re

from qcli.errors import KernelError

DRIVER = "install or update NVIDIA's driver; a container must be started with the GPU: docker run --gpus all"
LAUNCH = "an earlier kernel may be the cause: CUDA_LAUNCH_BLOCKING=1 shows which"
NVCC = "install NVIDIA's CUDA toolkit and put the folder of its nvcc on PATH"
PYCUDA = "pip install 'qcli[cuda]'"
PYCUDA_AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir pycuda"
TORCH = "install a CUDA build of torch: https://pytorch.org/get-started"

# (a pattern in the error of importing PyCUDA, what it means, what to do). The first match decides.
_IMPORT = (
    (r"No module named 'pycuda'$", "is not installed", PYCUDA),
    (r"libcuda\.so.*(No such file|cannot open)", "finds no driver", DRIVER),
    (r"undefined symbol: cu[A-Z]|libcu\w+\.so", "was built for another version of CUDA", PYCUDA_AGAIN),
    (r"pycuda\._|undefined symbol|multiarray|ABI|numpy\.", "was built for another Python or numpy", PYCUDA_AGAIN),
    (r"No module named", "lacks a package that it needs", PYCUDA),
    (r"", "cannot be imported", PYCUDA_AGAIN),
)

# (a pattern in nvcc's first error, what to do).
_COMPILE = (
    (r"Unsupported gpu architecture", "install a version of NVIDIA's CUDA toolkit that supports this GPU"),
    (r"host compiler", "nvcc needs a C++ compiler: apt install g++"),
    (r"unsupported (GNU|clang) version", "install an older g++ and name it: export NVCC_PREPEND_FLAGS='-ccbin g++-12'"),
    (r"fatal error: (cuda|crt|nv/|cooperative)", "the toolkit lacks its headers: install it whole"),
)


def import_error(error: Exception) -> KernelError:
    """What is wrong with PyCUDA if importing it raised `error`."""
    what, hint = next((what, hint) for pattern, what, hint in _IMPORT if re.search(pattern, str(error)))
    return KernelError(f"PyCUDA {what} ({error})", hint)


def compile_hint(line: str) -> str | None:
    """What to do if nvcc's first error is this line; None if the kernel itself is wrong."""
    return next((hint for pattern, hint in _COMPILE if re.search(pattern, line)), None)
