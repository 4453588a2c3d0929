"""Registration of ops, the same way for all."""

from collections.abc import Callable

import torch

from qcli.runtime import cpu as cpu_runtime
from qcli.runtime import cuda as cuda_runtime

_LIBRARY = torch.library.Library("qcli", "FRAGMENT")


def define(
    schema: str, reference: Callable, fake: Callable, cpu: Callable | None = None, cuda: Callable | None = None
) -> Callable:
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
        _LIBRARY.impl(
            name, lambda *arguments: (cuda if cuda_runtime.serves(arguments[0]) else reference)(*arguments), "CUDA"
        )
    torch.library.register_fake(f"qcli::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.qcli, name).default


def blocks(count: int, block_size: int) -> int:
    """Blocks that `count` elements take, the last one possibly partial."""
    return (count + block_size - 1) // block_size
