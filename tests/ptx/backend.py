"""A backend of qcli.runtime.cuda that runs the PTX that nvcc makes of the kernels, on CPU tensors."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from qcli.runtime import cuda, nvcc
from tests.emulator.emulator import KERNELS, SHARED
from tests.ptx.lanes import Fault
from tests.ptx.machine import Machine
from tests.ptx.memory import Global
from tests.ptx.parse import Module, PtxError, parse

LANES = 1 << 14  # lanes at once, in whole blocks


class Interpreter:
    """Compiles to PTX for a compute capability, and reports that capability to host code. `folder` keeps the PTX."""

    def __init__(self, folder: Path, *, sources: Path = KERNELS, capability: tuple[int, int] = (9, 0)):
        self.folder, self.sources, self.of = folder, sources, capability
        self.launched: list[str] = []  # the kernel of each launch
        self.steps = 0  # instructions run, each of many lanes
        self._arrays: dict[int, int] = {}  # address -> bytes, of the tensors whose address host code read
        self._modules: dict[tuple, Module] = {}

    @contextmanager
    def running(self) -> Iterator["Interpreter"]:
        """Runs kernels on this backend while it lasts. A kernel may access only the tensors that its launch got. Their addresses
        are recorded when host code reads them."""
        data_ptr, before = torch.Tensor.data_ptr, torch.Tensor.__dict__.get("data_ptr")

        def noting(tensor: torch.Tensor) -> int:
            address = data_ptr(tensor)
            self._arrays[address] = tensor.numel() * tensor.element_size()
            return address

        torch.Tensor.data_ptr = noting
        try:
            with cuda.using(self):
                yield self
        finally:
            if before:
                torch.Tensor.data_ptr = before
            else:
                del torch.Tensor.data_ptr  # it is inherited again

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def multiprocessors(self, device: torch.device) -> int:
        return 1 if self.of[0] == 9 else 6  # as in the emulator

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.of

    def shared_memory(self, device: torch.device) -> int:
        return SHARED[self.of]

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> tuple[Module, str]:
        """As in Backend."""
        key = source, constants, self.of
        if key not in self._modules:
            self._modules[key] = parse(self._compiled(source, constants))
        return self._modules[key], entry

    def _compiled(self, source: str, constants: tuple[str, ...]) -> str:
        path = self.sources / f"{source}.cu"
        headers = [*sorted(self.sources.glob("*.cuh")), *sorted(KERNELS.glob("*.cuh"))]
        texts = b"".join(file.read_bytes() for file in [path, *headers])
        target = "90a" if self.of == (9, 0) else f"{self.of[0]}{self.of[1]}"
        key = hashlib.sha256(texts + repr((constants, target)).encode()).hexdigest()[:16]
        file = self.folder / f"{source}-{key}.ptx"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            command = [nvcc.require(), "-ptx", f"-arch=compute_{target}", *nvcc.FLAGS, "-lineinfo", "-I", str(KERNELS)]
            defined = [f"-D{constant}" for constant in constants]
            partial = file.with_suffix(f".{os.getpid()}")
            done = subprocess.run([*command, *defined, "-o", partial, path], capture_output=True, text=True)
            if done.returncode:
                raise PtxError(f"nvcc cannot compile {path}: {done.stderr}")
            partial.replace(file)
        return file.read_text()

    def launch(self, function, grid: tuple, block: tuple, shared: int, arguments: bytes, device: torch.device) -> None:
        """As in Backend. Raises Fault."""
        module, entry = function
        kernel = module.functions[entry]
        expected = max((offset + size for offset, size in kernel.arguments.values()), default=0)
        if len(arguments) != expected:
            raise Fault(f"{entry}: the launch packs {len(arguments)} bytes of arguments, the kernel takes {expected}")
        if block[0] % 32 or not 0 < block[0] <= kernel.most_threads or min(grid) < 1:
            raise Fault(f"{entry}: a grid of {grid} blocks of {block} threads, expected whole warps, at most {kernel.most_threads}")
        most = SHARED[self.of] - 1024
        used = shared + sum(variable.size or 0 for variable in kernel.shared)
        if used > most:
            raise Fault(f"{entry}: {used} bytes of shared memory, a block has {most}")
        memory = Global(self._given(kernel.arguments, arguments))
        numbers = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid[::-1]), 1)[:, ::-1]  # x varies fastest
        together = max(1, LANES // block[0])
        for first in range(0, len(numbers), together):
            some = numbers[first : first + together]
            machine = Machine(module, entry, some, grid, block[0], shared, arguments, memory)
            machine.run()
            self.steps += machine.steps
        self.launched.append(entry)

    def _given(self, parameters: dict[str, tuple[int, int]], arguments: bytes) -> dict[int, int]:
        """The tensors among the arguments: {address: bytes}."""
        words = (int.from_bytes(arguments[at : at + 8], "little") for at, size in parameters.values() if size == 8)
        return {address: self._arrays[address] for address in words if address in self._arrays}
