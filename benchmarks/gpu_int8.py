"""A part of benchmarks/gpu.py: LLM.int8() for many tokens, on the layer of the paper's table, the first of a feed-forward block.

The layer is d to 4d. LLM.int8(), arXiv:2208.07339, appendix D, gives its speed relative to 16 bits at the sizes of GPT-3: 0.64,
0.86, 1.22 and 1.81.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from gpu_linears import OUTLIERS, activations, linear8bitlt
from gpu_ops import ROWS
from gpu_timing import Candidate
from rows import Row

from qcli.ops import linear_int8

MANY = 2048  # tokens
FUSED = 1.65

# d -> (name of the size, the required speed of torch's product with a separate epilogue, relative to bfloat16).
SIZES = {2560: ("2.7B", 0.64), 4096: ("6.7B", 0.86), 5120: ("13B", 1.22), 12288: ("175B", 1.5)}


@contextmanager
def fusing(fused: bool) -> Iterator[None]:
    """Forces our own fused product, or torch._int_mm and an epilogue, whatever is chosen for this GPU."""
    with mock.patch.object(linear_int8, "_fuses", lambda x, columns: fused):
        yield


def run(gpu, limits: dict[str, float]) -> Iterator[tuple[str, Row]]:
    """(unit, row)."""
    for d, (name, must) in SIZES.items():
        n, k = gpu.layer(4 * d, d)
        yield from size(gpu, limits, f"LLM.int8() {name}, {d} to {4 * d}", n, k, must)
        gpu.free()


def size(gpu, limits, name: str, n: int, k: int, must: float) -> Iterator[tuple[str, Row]]:
    """Both products compared with bfloat16 and bitsandbytes, and the time of each part."""
    tokens = gpu.tokens(MANY)
    weight = torch.randn(n, k, device=gpu.device) * 0.02
    q, scale, _ = gpu.call("quantize_int8", weight, 0.0)
    theirs, full = linear8bitlt(weight, gpu.device), weight.bfloat16()
    del weight
    x = activations(gpu, tokens, k, OUTLIERS)
    half = x.half()

    def ours(fused: bool) -> Callable[..., torch.Tensor]:
        def call(i: int = 0):
            with fusing(fused):
                return gpu.call("linear_int8", x, q, scale, None, 6.0)

        return call

    candidates = {
        "bfloat16": Candidate(lambda i: torch.nn.functional.linear(x, full)),
        "separate epilogue": Candidate(ours(False)),
        "fused": Candidate(ours(True)),
        "bitsandbytes": Candidate(lambda i: theirs(half), captured=False),
    }
    times = gpu.time(candidates)
    row = Row(f"{name}, {tokens} tokens, {len(OUTLIERS)} outlier columns", times.microseconds())
    bfloat16 = times["bfloat16"]
    row.compare("separate epilogue faster than bfloat16", bfloat16 / times["separate epilogue"], must)
    row.compare("fused faster than bfloat16", bfloat16 / times["fused"], None, FUSED)
    best = min(times["separate epilogue"], times["fused"])
    row.compare("the better faster than bitsandbytes", times["bitsandbytes"] / best, None)
    operations = 2 * tokens * n * k
    row.compare("fused of the int8 rate", operations / times["fused"] / limits["int8"], None)
    row.compare("bfloat16 of the bfloat16 rate", operations / bfloat16 / limits["bfloat16"], None)
    yield ROWS, row

    quantized, _, _ = gpu.call("quantize_int8", x, 6.0)
    product = gpu.time({"": Candidate(lambda i: torch._int_mm(quantized, q.t()))})[""]
    for fused in (False, True):
        parts = {entry: 1e6 * seconds for entry, seconds in gpu.kernels(ours(fused)).items()}
        if not fused:
            parts["torch._int_mm"] = 1e6 * product
        yield ROWS, Row(f"{name}, parts, {'fused' if fused else 'separate epilogue'}", parts)
