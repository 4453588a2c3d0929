"""Registration of ops, the same way for all."""

import warnings
from collections.abc import Callable

import torch

from qcli.errors import NotCompiledError, QcliWarning
from qcli.runtime import cpu as cpu_runtime
from qcli.runtime import cuda as cuda_runtime

_LIBRARY = torch.library.Library("qcli", "FRAGMENT")


def define(schema: str, reference: Callable, fake: Callable, cpu: Callable | None = None, cuda: Callable | None = None) -> Callable:
    """Defines `qcli::schema`; `reference` serves every device that no kernel is registered for. Returns the op.

    `cpu` calls the compiled kernel, where the library was built; `cuda` that of PyCUDA, where it serves the device.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None and cpu_runtime.variants():
        # Looked up at each call, for `using` may change it.
        _LIBRARY.impl(name, lambda *arguments: (cpu if cpu_runtime.variant() else reference)(*arguments), "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, _on_cuda(cuda, reference), "CUDA")
    torch.library.register_fake(f"qcli::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.qcli, name).default


def _on_cuda(cuda: Callable, reference: Callable) -> Callable:
    """Calls the kernel where it serves, and the reference elsewhere, also for the rare form of a kernel that a package
    without nvcc lacks."""

    def run(*arguments):
        if cuda_runtime.serves(arguments[0]):
            try:
                return cuda(*arguments)
            except NotCompiledError as e:
                warnings.warn(f"{e}; plain torch runs in its place: {e.hint}", QcliWarning, stacklevel=2)
        return reference(*arguments)

    return run


def blocks(count: int, block_size: int) -> int:
    """Blocks that `count` elements take, the last one possibly partial."""
    return (count + block_size - 1) // block_size


def persistent_grid(x: torch.Tensor, tiles: int, shared: int) -> tuple[int]:
    """CUDA blocks that stay until all tiles are done: as many as fit at once, two to a multiprocessor where each gets `shared`
    bytes of shared memory."""
    together = 2 if 2 * (shared + 1024) <= cuda_runtime.shared_memory(x) else 1
    return (min(tiles, together * cuda_runtime.multiprocessors(x)),)
