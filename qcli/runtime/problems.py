"""What keeps CUDA kernels from running, in sentences, and what mends it."""

import re

from qcli.errors import KernelError

DRIVER = "install or update NVIDIA's driver; a container must be started with the GPU: docker run --gpus all"
NVCC = "install NVIDIA's CUDA toolkit and put the folder of its nvcc on PATH"
PYCUDA = "pip install 'qcli[cuda]'"
PYCUDA_AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir --no-binary pycuda pycuda"
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


def of_import(error: Exception) -> KernelError:
    """What is wrong with PyCUDA where importing it raised `error`."""
    what, hint = next((what, hint) for pattern, what, hint in _IMPORT if re.search(pattern, str(error)))
    return KernelError(f"PyCUDA {what} ({error})", hint)
