"""Shared by the tests of the CUDA kernels: compares an op's kernel on a device with its reference on the CPU.

Nothing here assumes a GPU: tests/test_gpu_checks.py runs the same functions on the emulator's kernels.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module

import torch

from qcli import codebooks, ops
from qcli.ops.dequantize_absmax import dequantize_absmax
from qcli.packing import unpack_4bit
from qcli.runtime import cpu, cuda, nvcc
from tests.gpu.images import wanted
from tests.parity import bits, disagreement, flat, results, written

KERNELS = [name for name in ops.names() if hasattr(import_module(f"qcli.ops.{name}"), "_cuda")]  # ops that have a CUDA kernel
PRODUCTS = ("as chosen", "fused")  # products of LLM.int8() for many tokens
WAYS = [(name, PRODUCTS[0]) for name in KERNELS] + [("linear_int8", PRODUCTS[1])]
FORMS = ("plain", "unaligned", "strided")  # layouts of a tensor in memory


class Noting:
    """A backend that records the kernels that it launches through another one."""

    def __init__(self, backend):
        self.backend, self.launched = backend, set()

    def __getattr__(self, name: str):
        return getattr(self.backend, name)

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> object:
        return entry, self.backend.function(source, entry, constants, device)

    def launch(self, function, grid, block, shared: int, arguments: bytes, device: torch.device) -> None:
        entry, real = function
        self.launched.add(entry)
        self.backend.launch(real, grid, block, shared, arguments, device)


@contextmanager
def noting() -> Iterator[set[str]]:
    """The names of the kernels that are launched while this lasts."""
    backend = Noting(cuda._backend)
    with cuda.using(backend):
        yield backend.launched


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory of torch begins as NaN, or as the largest integer, so an element that a kernel does not write is visible."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def moved(arguments: dict, device: torch.device, form: str = "plain") -> dict:
    """The arguments with their tensors on the device, each in that form."""
    return {name: _in_form(value, device, form) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def _in_form(tensor: torch.Tensor, device: torch.device, form: str) -> torch.Tensor:
    if form == "plain" or not tensor.dim():
        return tensor.to(device, copy=True)
    if form == "unaligned":
        view = tensor.new_empty(tensor.numel() + 1, device=device)[1:].view(tensor.shape)
    else:
        view = tensor.new_empty((*tensor.shape[:-1], 2 * tensor.shape[-1]), device=device)[..., ::2]
    return view.copy_(tensor)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def reference(name: str, arguments: dict):
    """The results of the reference, on the CPU."""
    with cpu.using(None):
        return results(name, import_module(f"qcli.ops.{name}")._reference, arguments)


def kernel(name: str, arguments: dict):
    """The result of the kernel, on the arguments' device."""
    return import_module(f"qcli.ops.{name}")._cuda(**arguments)


def wrong(name: str, arguments: dict, device: torch.device, form: str = "plain") -> str | None:
    """What is wrong with the kernel's result for arguments on the CPU; None if nothing is."""
    changes = written(name)
    given = moved(arguments, device, form)
    if form == "strided":  # what a kernel changes, it changes where it is
        given |= moved({key: arguments[key] for key in changes}, device)
    before = {key: _copy(value) for key, value in given.items() if isinstance(value, torch.Tensor)}
    with poisoned():
        ours = kernel(name, given)
    ours = *flat(ours), *(given[key] for key in changes if given[key] is not None)
    changed = [k for k, value in before.items() if k not in changes and not torch.equal(bits(_copy(given[k])), bits(value))]
    if changed:
        return f"the kernel wrote to its input {changed[0]}"
    return disagreement(name, arguments, ours, reference(name, arguments))


def wrong_in_rows(name: str, arguments: dict, rows: torch.Tensor) -> str | None:
    """As `wrong`, for a product with arguments on the device. Only some rows of the weight are computed again, because all rows of
    a large layer would take minutes on the CPU."""
    with poisoned():
        ours = kernel(name, arguments)[..., rows.to(arguments["x"].device)]
    some = of_rows(name, arguments, rows)
    return disagreement(name, some, ours, reference(name, some))


def of_rows(name: str, arguments: dict, rows: torch.Tensor) -> dict:
    """The arguments of the product for those rows of the weight, on the CPU."""
    on_cpu, on_device = torch.device("cpu"), rows.to(arguments["x"].device)
    some = dict(arguments)
    if name == "linear_4bit":
        absmax, out_features, some["out_features"] = arguments["absmax"], arguments["out_features"], len(rows)
        if absmax.dtype == torch.uint8:
            wide = dequantize_absmax(absmax.cpu(), arguments["nested_absmax"].cpu(), arguments["offset"])
            some |= {"absmax": wide.to(absmax.device), "nested_absmax": None, "offset": 0.0}
    else:
        out_features = len(arguments["weight"])
    for key in ("packed", "absmax", "weight", "scale", "zero_point", "bias"):
        if some.get(key) is not None:
            some[key] = _rows(some[key], out_features, on_device)
    return moved(some, on_cpu)


def _rows(tensor: torch.Tensor, count: int, rows: torch.Tensor) -> torch.Tensor:
    """Those rows of a tensor with the values of `count` rows, each row's one after the other. Its dimensions stay as they are."""
    bits = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # not all dtypes of a byte can be indexed
    chosen = bits.view(count, -1)[rows].view(tensor.dtype)
    return chosen.view(-1, *tensor.shape[1:])


def same_bits(ours, theirs) -> bool:
    """Whether two results of a kernel are the same. NaN equals NaN."""
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(flat(ours), flat(theirs), strict=True))


def compile_all(capability: tuple[int, int], more: dict[str, list[tuple[str, ...]]]) -> int:
    """Compiles every image that a package would contain, and `more`, on all cores: one by one they would take minutes. Returns the
    number of images."""
    with ThreadPoolExecutor() as pool:
        return len(list(pool.map(lambda one: nvcc.image(*one, capability), wanted(more))))


def far_from_thresholds(x, ours, theirs, absmax, block_size: int, quant_type: str) -> int:
    """The number of elements of x whose codes differ between `theirs` and `ours` although x / absmax is on no threshold."""
    codes = [unpack_4bit(packed.view(-1).cpu(), x.numel()) for packed in (ours, theirs)]
    other = (codes[0] != codes[1]).nonzero().view(-1)
    of_block = absmax.cpu().double().index_select(0, other // block_size)
    v = x.reshape(-1).cpu().index_select(0, other).double() / of_block
    thresholds = torch.from_numpy(codebooks.THRESHOLDS[quant_type]).double()
    return int(((v[:, None] - thresholds).abs().amin(1) > 1e-6).sum()) if len(other) else 0
