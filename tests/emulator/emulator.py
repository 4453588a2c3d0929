"""Compiles the .cu files with g++ and the header beside this file, and launches them on CPU tensors."""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import torch

from tests.conftest import ROOT

HERE = Path(__file__).parent
KERNELS = ROOT / "kernels" / "cuda"
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
SHARED = {  # bytes, by compute capability
    (7, 5): 65 << 10,
    (8, 0): 164 << 10,
    (8, 6): 100 << 10,
    (9, 0): 228 << 10,
    (10, 0): 228 << 10,
}
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


class LaunchError(Exception):
    """An error that the emulator found in a launch."""


@cache
def cuda_headers() -> Path | None:
    """The folder of cuda_fp16.h, from the toolkit or from the nvidia-cuda-runtime package."""
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    nvcc = shutil.which("nvcc")
    places = [
        *([Path(os.environ["CUDA_HOME"]) / "include"] if os.environ.get("CUDA_HOME") else []),
        *([Path(nvcc).resolve().parent.parent / "include"] if nvcc else []),
        Path("/usr/local/cuda/include"),
        *sorted(site.glob("*/include")),
    ]
    return next((place for place in places if (place / "cuda_fp16.h").exists()), None)


def missing() -> str | None:
    """Why the emulator cannot run here; None if it can."""
    if platform.machine() != "x86_64":
        return "the emulator needs an x86-64 processor"
    if not shutil.which("g++"):
        return "the emulator needs g++"
    return None if cuda_headers() else "the emulator needs CUDA's headers: pip install nvidia-cuda-runtime"


def sanitized() -> dict[str, str]:
    """The environment of a Python process that loads sanitized kernels: the sanitizer must be loaded first."""
    found = (
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    )
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


class Emulator:
    """A backend of qcli.runtime.cuda on the CPU. Compiled kernels are kept in `folder`."""

    def __init__(self, folder: Path, *, sanitize: bool = False, sources: Path = KERNELS):
        self.folder, self.sources, self.order = folder, sources, "forward"
        self.of = 9, 0  # the compute capability that the emulator reports
        self.flags = ["-std=c++17", "-Og", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-frounding-math"]
        self.flags += ["-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable"]
        self.flags += ["-DQCLI_EMULATOR", "-I", str(HERE), "-I", str(KERNELS), "-isystem", str(cuda_headers())]
        self.flags += SANITIZERS if sanitize else []
        self.launched: set[str] = set()

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def multiprocessors(self, device: torch.device) -> int:
        return 1 if self.of[0] == 9 else 6  # with these, blocks take several tiles, or share one

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.of

    def shared_memory(self, device: torch.device) -> int:
        return SHARED[self.of]

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device):
        function = getattr(self._library(source, constants), f"emulate_{entry}")
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
        return f"{source}.cu: {entry}", function

    def launch(self, function, grid, block, shared: int, arguments: bytes, device: torch.device) -> None:
        name, call = function
        # The system reserves a kilobyte of it per block. (CUDA C++ programming guide, compute capabilities)
        if shared > SHARED[self.of] - 1024:
            raise LaunchError(f"{name}: {shared} bytes of dynamic shared memory, a block has {SHARED[self.of] - 1024}")
        three = ctypes.c_uint * 3
        error = call(three(*grid), three(*block), shared, arguments, len(arguments), ORDERS[self.order])
        if error:
            raise LaunchError(f"{name}: {error.decode()}")
        self.launched.add(name)

    def _library(self, source: str, constants: tuple[str, ...]) -> ctypes.CDLL:
        path = self.sources / f"{source}.cu"
        used = [path, *sorted(KERNELS.glob("*.cuh")), *sorted(HERE.glob("*.h"))]
        text = b"".join(file.read_bytes() for file in used) + repr((self.flags, constants)).encode()
        library = self.folder / f"{source}-{hashlib.sha256(text).hexdigest()[:16]}.so"
        if not library.exists():
            entries = re.findall(r"^KERNEL\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", path.read_text(), re.M)
            unit = f'#include "{path}"\n' + "".join(f"EMULATE({entry})\n" for entry in entries)
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}")
            command = ["g++", *self.flags, *self._precompiled(), *(f"-D{c}" for c in constants), "-shared", "-x", "c++", "-"]
            subprocess.run([*command, "-o", str(partial)], input=unit, text=True, check=True)
            partial.replace(library)
        return ctypes.CDLL(str(library))

    def _precompiled(self) -> list[str]:
        """The emulator's header, parsed once for all kernels."""
        text = b"".join(file.read_bytes() for file in sorted(HERE.glob("*.h"))) + repr(self.flags).encode()
        folder = self.folder / f"header-{hashlib.sha256(text).hexdigest()[:16]}"
        header = folder / "cuda_emulator.h"
        if not header.with_suffix(".h.gch").exists():
            folder.mkdir(parents=True, exist_ok=True)
            header.write_text(f'#include "{HERE / header.name}"\n')
            partial = folder / f"{os.getpid()}.gch"
            subprocess.run(["g++", *self.flags, "-x", "c++-header", str(header), "-o", str(partial)], check=True)
            partial.replace(header.with_suffix(".h.gch"))
        return ["-include", str(header)]
