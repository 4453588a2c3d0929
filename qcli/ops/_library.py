"""Registers the ops, all in the same way."""

import warnings
from collections.abc import Callable

import torch

from qcli.errors import NotCompiledError, QcliWarning
from qcli.runtime import cpu as cpu_runtime
from qcli.runtime import cuda as cuda_runtime

_LIBRARY = torch.library.Library("qcli", "FRAGMENT")


def define(schema: str, reference: Callable, fake: Callable, cpu: Callable | None = None, cuda: Callable | None = None) -> Callable:
    """Defines the op `qcli::schema` and returns it. `reference` runs on every device without a kernel.

    `cpu` calls the compiled kernel; it is used if the library was built. `cuda` calls the CUDA kernel; it is used on devices on
    which kernels run.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    if cpu is not None and cpu_runtime.variants():
        # The variant is looked up at each call because `using` may change it.
        _LIBRARY.impl(name, lambda *arguments: (cpu if cpu_runtime.variant() else reference)(*arguments), "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, _on_cuda(cuda, reference), "CUDA")
    torch.library.register_fake(f"qcli::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.qcli, name).default


def differentiate(name: str, weight: Callable, rows: Callable) -> None:
    """Makes a product x W^T + bias differentiable with respect to x, its first argument, alone: the gradient is that of the result,
    times W. An op that rounds x passes the gradient through as if it did not (straight-through).

    weight(x, *rest) returns W [out_features, in_features] in the dtype of the product (see product_dtype); `x` is [0, in_features]
    of x's dtype, and `rest` are the op's other arguments. A large W is decoded a panel at a time, and never stands in memory whole:
    rows(x, *rest) returns (grain, take). take(start, stop) is `rest` of the op whose weight is rows `start` to `stop` of W, and
    panels begin at multiples of `grain`.
    """

    def keep(ctx, inputs, output) -> None:
        x, *rest = inputs
        ctx.places = [i for i, value in enumerate(rest) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(x.new_empty((0, x.shape[-1])), *(rest[i] for i in ctx.places))
        ctx.rest = [None if i in ctx.places else value for i, value in enumerate(rest)]

    def gradient(ctx, of_result):
        rest = list(ctx.rest)
        x, *tensors = ctx.saved_tensors
        for i, tensor in zip(ctx.places, tensors):
            rest[i] = tensor
        return _of_input(of_result, x, rest, weight, rows), *(None for _ in rest)

    torch.library.register_autograd(f"qcli::{name}", gradient, setup_context=keep, lib=_LIBRARY)


# Bytes of W that are decoded at a time for a gradient. On a GPU a panel must keep all multiprocessors busy.
_PANEL_BYTES, _PANEL_BYTES_CUDA = 16 << 20, 64 << 20


def _of_input(of_result: torch.Tensor, x: torch.Tensor, rest: list, weight: Callable, rows: Callable) -> torch.Tensor:
    """The gradient with respect to x, in x's dtype. Several panels are added in float32."""
    out_features, row_bytes = of_result.shape[-1], x.shape[-1] * x.element_size()
    most = _PANEL_BYTES_CUDA if x.is_cuda else _PANEL_BYTES
    if out_features * row_bytes <= most:
        w = weight(x, *rest)
        return (of_result.to(w.dtype) @ w).to(x.dtype)
    grain, take = rows(x, *rest)
    step = max(1, most // (row_bytes * grain)) * grain
    total = of_result.new_zeros((*of_result.shape[:-1], x.shape[-1]), dtype=torch.float32)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        w = weight(x, *take(start, stop))
        total += of_result[..., start:stop].to(w.dtype) @ w
    return total.to(x.dtype)


def product_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a product that is to be made in `dtype` is made where `x` lies. On a CPU without bfloat16 that is float32:
    torch would widen the weight for every few rows of x again."""
    emulated = x.is_cpu and dtype == torch.bfloat16 and not cpu_runtime.native_bfloat16()
    return torch.float32 if emulated else dtype


def _on_cuda(cuda: Callable, reference: Callable) -> Callable:
    """Calls the kernel on devices on which kernels run, else the reference. The reference also replaces a rare form of a kernel
    that is not precompiled where there is no nvcc."""

    def run(*arguments):
        if cuda_runtime.serves(arguments[0]):
            try:
                return cuda(*arguments)
            except NotCompiledError as e:
                warnings.warn(f"{e}; plain torch runs in its place: {e.hint}", QcliWarning, stacklevel=2)
        return reference(*arguments)

    return run


def blocks(count: int, block_size: int) -> int:
    """The number of blocks for `count` elements. The last block may be partial."""
    return (count + block_size - 1) // block_size


def persistent_grid(x: torch.Tensor, tiles: int, shared: int) -> tuple[int]:
    """The grid of a kernel whose CUDA blocks stay until all tiles are done: as many blocks as run at the same time. That is two per
    multiprocessor if `shared` bytes of shared memory per block allow it, else one."""
    together = 2 if 2 * (shared + 1024) <= cuda_runtime.shared_memory(x) else 1
    return (min(tiles, together * cuda_runtime.multiprocessors(x)),)
