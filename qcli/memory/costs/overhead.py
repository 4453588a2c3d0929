"""What a process takes on a device besides its tensors. It is given as a range, because there is no formula for it.

Sources: CUDA context and lazily loaded kernels, 287,047,680 bytes in pytorch#86509, 300 MB to 400 MB in pytorch#107667 and
#109888, 140.9 MiB on a T4 with torch 2.10 and later; cuBLAS workspaces from ATen's CublasHandlePool.cpp; blocks of the caching
allocator from CUDACachingAllocator.cpp. vLLM's from its own logs: 0.27 to 0.39 GiB outside torch, CUDA graphs 0.26 to
0.58 GiB. On a CPU: resident memory of `qcli generate` with a model of 214 kB, 374 MiB with torch 2.13, transformers 5.23.
"""

from dataclasses import dataclass

from qcli.errors import UsageError
from qcli.memory.costs.cache_parts import RUNTIMES

_MIB = 2**20
_CONTEXT = (140 * _MIB, 512 * _MIB, 640 * _MIB)
_GRAPHS = (270 * _MIB, 410 * _MIB, 590 * _MIB)
_PROCESS = (340 * _MIB, 375 * _MIB, 450 * _MIB)
_WORKSPACE = 8_519_680
_WORKSPACE_HOPPER = 33_554_432
DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class Overhead:
    """Bytes on one device: at least, likely and at most. `components` has the same three for each item; they add up."""

    low: int
    likely: int
    high: int
    components: dict[str, tuple[int, int, int]]
    formula: tuple[str, ...]


def overhead(weights: int, transient: int, runtime: str = "transformers", device: str = "cuda", hopper: bool = False) -> Overhead:
    """The overhead on one device with `weights` bytes that stay and `transient` bytes that come and go (activations, and a cache
    that grows). `hopper`: compute capability 9.0, whose cuBLAS workspace is larger. Raises UsageError for an unknown name."""
    for name, value, known in (("runtime", runtime, RUNTIMES), ("device", device, DEVICES)):
        if value not in known:
            raise UsageError(f"{name} is {value!r}, expected one of {', '.join(known)}.")
    if device == "cpu":
        items = {"Python, torch and transformers": _PROCESS}
        formula = ["Python, torch and transformers: resident memory of a run whose model weighs nothing"]
    else:
        workspace = _WORKSPACE_HOPPER if hopper else _WORKSPACE
        items = {
            "CUDA context and kernels": _CONTEXT,
            "cuBLAS workspaces": (workspace, 2 * workspace, 2 * workspace),
            "fragmentation": (0, max(256 * _MIB, transient * 5 // 100), max(512 * _MIB, (weights + transient) * 5 // 100)),
        }
        formula = [
            "CUDA context and kernels: 140 MiB to 640 MiB, depending on GPU, driver and kernels loaded",
            f"cuBLAS workspaces: {workspace} bytes for each handle and stream, one or two of them",
            "fragmentation: the larger of 256 MiB and 5% of what comes and goes; at most 512 MiB or 5% of all",
        ]
        if runtime == "vllm":
            items["CUDA graphs"] = _GRAPHS
            formula.append("CUDA graphs: 0.26 GiB to 0.58 GiB")
    low, likely, high = (sum(column) for column in zip(*items.values(), strict=True))
    return Overhead(low, likely, high, items, tuple(formula))
