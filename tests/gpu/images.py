"""The images of the kernels that the tests need. They are compiled together, on all cores, before the first test."""

from itertools import product

import torch

from qcli.runtime import nvcc

_HALF, _ALL = ("__nv_bfloat16", "__half"), ("float", "__nv_bfloat16", "__half")
_BLOCK_SIZES = (2, 6, 16, 32, 128, 256, 512, 4096)


def _with_other_bias(dtypes: tuple[str, ...], **more: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Constants for a bias of another dtype than the activations, with each value of `more`."""
    rest = list(product(*([f"{name}={value}" for value in values] for name, values in more.items())))
    return [(f"DTYPE={x}", *few, f"BIAS={b}") for x in dtypes for b in _ALL if x != b for few in rest]


def _with_block_sizes(sizes: tuple[int, ...], *more: str) -> list[tuple[str, ...]]:
    return [(f"DTYPE={x}", f"BLOCK_SIZE={n}", *more) for x in _ALL for n in sizes]


# Images by source, in addition to those that a package would contain.
MORE = {
    "attend": [(f"STORED={x}", f"QUERIES={n}", "ALIGNED=0") for x in (*_ALL, "int8_t") for n in (1, 4)],
    "quantize_4bit": _with_block_sizes(_BLOCK_SIZES),
    "dequantize_4bit": _with_block_sizes(_BLOCK_SIZES) + _with_block_sizes((32, 64, 128), "ZERO=1"),
    "linear_4bit": [(f"DTYPE={x}", "CHUNK=64", "SCALES=0", "ZERO=1", f"FULL={n}") for x in _HALF for n in (0, 1, 2)],
    "linear_4bit_batch": [
        (f"DTYPE={x}", "CHUNK=64", "SCALES=0", "ZERO=1", f"TOKENS={tokens}", f"STAGES={stages}")
        for x in _HALF
        for tokens in (16, 32, 64)
        for stages in (2, 3)
    ],
    "linear_int8": _with_other_bias(_ALL, FULL=(0, 1)),
    "linear_int8_epilogue": _with_other_bias(_ALL),
    "linear_int8_gemm": _with_other_bias(_HALF, STAGES=(3, 4)),
    "linear_table": [
        (f"DTYPE={x}", f"BITS={bits}", *form)
        for x in _HALF
        for bits in (2, 3, 4)
        for form in (("GROUP=0", "OWN=1", "ZERO=1"), ("GROUP=1", "OWN=1", "ZERO=1"), ("GROUP=3", "OWN=0"))
    ],
    "linear_w8a16": _with_other_bias(_HALF, FULL=(0, 1)),
}


def wanted(more: dict[str, list[tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """(source, constants) of every image that a package would contain, and of `more`."""
    every = [(source, constants) for source in nvcc.sources() for constants in nvcc.instances(source)]
    return list(dict.fromkeys(every + [(source, constants) for source in more for constants in more[source]]))


class Asking:
    """A backend that records which kernels are needed on a GPU of that compute capability, and runs nothing. `asked` are (source,
    entry, constants)."""

    def __init__(self, capability: tuple[int, int], shared_memory: int, multiprocessors: int = 132):
        self.of, self.shared, self.count, self.asked = capability, shared_memory, multiprocessors, set()

    def serves(self, device: torch.device) -> bool:
        return True

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device) -> tuple:
        return source, entry, constants

    def launch(self, function: tuple, grid, block, shared: int, arguments: bytes, device: torch.device) -> None:
        self.asked.add(function)

    def multiprocessors(self, device: torch.device) -> int:
        return self.count

    def capability(self, device: torch.device) -> tuple[int, int]:
        return self.of

    def shared_memory(self, device: torch.device) -> int:
        return self.shared
