"""What keeps CUDA kernels from running, in sentences, and what mends it."""

import re

from qcli.errors import KernelError

DRIVER = "install or update NVIDIA's driver; a container must be started with the GPU: docker run --gpus all"
LAUNCH = "an earlier kernel may be the cause: CUDA_LAUNCH_BLOCKING=1 shows which"
NVCC = "install NVIDIA's CUDA toolkit and put the folder of its nvcc on PATH"
PYCUDA = "pip install 'qcli[cuda]'"
PYCUDA_AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir pycuda"
TORCH = "install a CUDA build of torch: https://pytorch.org/get-started"

# A pattern in what importing PyCUDA raises, what that means, what to do. The first that fits.
_IMPORT = (
    (r"No module named 'pycuda'$", "is not installed", PYCUDA),
    (r"libcuda\.so.*(No such file|cannot open)", "finds no driver", DRIVER),
    (r"undefined symbol: cu[A-Z]|libcu\w+\.so", "was built for another version of CUDA than is here", PYCUDA_AGAIN),
    (r"pycuda\._|undefined symbol|multiarray|ABI|numpy\.", "was built for another Python or numpy", PYCUDA_AGAIN),
    (r"No module named", "lacks a package that it needs", PYCUDA),
    (r"", "cannot be imported", PYCUDA_AGAIN),
)

# The same of nvcc's first error.
_COMPILE = (
    (r"Unsupported gpu architecture", "install a version of NVIDIA's CUDA toolkit that knows this GPU"),
    (r"host compiler", "nvcc needs a C++ compiler: apt install g++"),
    (r"unsupported (GNU|clang) version", "install an older g++ and name it: export NVCC_PREPEND_FLAGS='-ccbin g++-12'"),
    (r"fatal error: (cuda|crt|nv/|cooperative)", "the toolkit lacks its headers: install it whole"),
)


def of_import(error: Exception) -> KernelError:
    """What is wrong with PyCUDA where importing it raised `error`."""
    what, hint = next((what, hint) for pattern, what, hint in _IMPORT if re.search(pattern, str(error)))
    return KernelError(f"PyCUDA {what} ({error})", hint)


def cure_of_compile(line: str) -> str | None:
    """What mends it where nvcc's first error is this line; None where it is the kernel that is wrong."""
    return next((hint for pattern, hint in _COMPILE if re.search(pattern, line)), None)
