"""A part of benchmarks/gpu.py: the limits of the GPU, and the ops that stream tensors."""

from collections.abc import Iterator

import bitsandbytes.functional as bnb
import torch
from gpu_timing import Candidate
from rows import Row

from qcli.ops.quantize_absmax import mean_absmax

ROWS = "microseconds"
COPIED = 4 << 30  # bytes
PRODUCT = 8192
INTEGER_PRODUCTS = ((8192, 8192, 8192), (2048, 10240, 2560), (2048, 16384, 4096), (2048, 49152, 12288))
SHAPES = ((4096, 11008), (28672, 8192))


def ceilings(gpu) -> tuple[dict[str, float], list[Row]]:
    """The GPU's limits: bytes per second copied (read plus written) and read, operations per second in bfloat16 and in int8. The
    fractions in all other rows refer to them."""
    memory = moving(gpu, 1 << 20 if gpu.tiny else COPIED)
    n = 64 if gpu.tiny else PRODUCT
    products = {f"bfloat16 {n}^3": bfloat16_rate(gpu, n)}
    for m, n, k in ((32, 64, 64),) if gpu.tiny else INTEGER_PRODUCTS:
        products[f"torch._int_mm {m}x{n}x{k}"] = int8_rate(gpu, m, n, k)
    first, *integers = products.values()
    limits = {"copy": memory["copy"], "read": memory["read"], "bfloat16": first, "int8": max(integers)}
    return limits, [
        Row("memory, GB/s", {name: rate / 1e9 for name, rate in memory.items()}),
        Row("matrix products, TFLOP/s or TOP/s", {name: rate / 1e12 for name, rate in products.items()}),
    ]


def moving(gpu, nbytes: int) -> dict[str, float]:
    """Bytes per second. The copy is timed twice: the difference is noise."""
    source, target = (torch.randn(nbytes // 4, device=gpu.device) for _ in range(2))
    copy = Candidate(lambda i: target.copy_(source))
    times = gpu.time({"copy": copy, "copy again": copy, "read": Candidate(lambda i: source.sum())})
    return {name: (1 if name == "read" else 2) * nbytes / seconds for name, seconds in times.items()}


def bfloat16_rate(gpu, n: int) -> float:
    """Operations per second of a square product."""
    a, b = (torch.randn(n, n, device=gpu.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / gpu.time({"": Candidate(lambda i: a @ b)})[""]


def int8_rate(gpu, m: int, n: int, k: int) -> float:
    """Operations per second of torch's int8 product."""
    q, w = (torch.randint(-127, 128, (rows, k), device=gpu.device, dtype=torch.int8) for rows in (m, n))
    return 2 * m * n * k / gpu.time({"": Candidate(lambda i: torch._int_mm(q, w.t()))})[""]


def run(gpu, limits: dict[str, float]) -> Iterator[tuple[str, Row]]:
    """(unit, row)."""
    for shape in SHAPES:
        yield from blockwise(gpu, limits, *gpu.layer(*shape), target=shape == SHAPES[0])
        gpu.free()
    for n, k in ((2048, 4096), (2048, 12288), (11008, 4096)):
        yield from row_wise(gpu, limits, *gpu.layer(n, k))
        gpu.free()


def blockwise(gpu, limits, n: int, k: int, target: bool) -> Iterator[tuple[str, Row]]:
    """NF4, with and without double quantization. bitsandbytes chooses its own stream for quantizing."""
    must, aim = (0.70, 0.85) if target else (None, None)
    count = gpu.copies(2 * n * k)
    xs = [torch.randn(n, k, device=gpu.device).bfloat16() for _ in range(count)]
    stored = [gpu.call("quantize_4bit", x, 64, "nf4") for x in xs]
    theirs = [bnb.quantize_4bit(x, blocksize=64, quant_type="nf4") for x in xs]
    moved = 2 * n * k + n * k // 2 + n * k // 64 * 4
    times = gpu.time(
        {
            "qcli": Candidate(lambda i: gpu.call("quantize_4bit", xs[i], 64, "nf4"), count),
            "bitsandbytes": Candidate(lambda i: bnb.quantize_4bit(xs[i], blocksize=64, quant_type="nf4"), count, False),
            "clone": Candidate(lambda i: xs[i].clone(), count),
        }
    )
    yield ROWS, _moving(Row(f"quantize NF4 {n}x{k}", times.microseconds()), times, moved, limits, must, aim)
    shape = [n, k]
    times = gpu.time(
        {
            "qcli": Candidate(lambda i: gpu.call("dequantize_4bit", *stored[i], 64, "nf4", shape, torch.bfloat16), count),
            "bitsandbytes": Candidate(lambda i: bnb.dequantize_4bit(*theirs[i]), count),
            "clone": Candidate(lambda i: xs[i].clone(), count),
        }
    )
    yield ROWS, _moving(Row(f"dequantize NF4 {n}x{k}", times.microseconds()), times, moved, limits, must, aim)
    offset = mean_absmax(stored[0][1])
    nested = [gpu.call("quantize_absmax", absmax, offset) for _, absmax in stored]
    times = gpu.time(
        {
            "quantize_absmax": Candidate(lambda i: gpu.call("quantize_absmax", stored[i][1], offset), count),
            "dequantize_absmax": Candidate(lambda i: gpu.call("dequantize_absmax", *nested[i], offset), count),
        }
    )
    yield ROWS, Row(f"absmax in 8 bits, of {n}x{k}", times.microseconds())


def row_wise(gpu, limits, n: int, k: int) -> Iterator[tuple[str, Row]]:
    """Row-wise int8 without and with outliers (which need a second reading), dequantization to bfloat16, and statistics."""
    count = gpu.copies(2 * n * k)
    xs = [torch.randn(n, k, device=gpu.device).bfloat16() for _ in range(count)]
    for x in xs:
        x[:, [3, 77, 200]] *= 20
    halves = [x.half() for x in xs]
    for threshold, moved in ((0.0, 3 * n * k), (6.0, 5 * n * k)):
        times = gpu.time(
            {
                "qcli": Candidate(lambda i, t=threshold: gpu.call("quantize_int8", xs[i], t), count),
                "bitsandbytes": Candidate(
                    lambda i, t=threshold: bnb.int8_vectorwise_quant(halves[i], threshold=t), count, not threshold
                ),
                "clone": Candidate(lambda i: xs[i].clone(), count),
            }
        )
        name = f"quantize int8 {n}x{k}, {'3 outlier columns' if threshold else 'no threshold'}"
        yield ROWS, _moving(Row(name, times.microseconds()), times, moved, limits)
    stored = [gpu.call("quantize_int8", x, 0.0)[:2] for x in xs]
    times = gpu.time(
        {
            "qcli": Candidate(lambda i: gpu.call("dequantize_int8", *stored[i], torch.bfloat16), count),
            "torch": Candidate(lambda i: stored[i][0].bfloat16() * (stored[i][1] / 127).bfloat16()[:, None], count),
        }
    )
    yield ROWS, _moving(Row(f"dequantize int8 {n}x{k}", times.microseconds()), times, 3 * n * k, limits)
    times = gpu.time({"qcli": Candidate(lambda i: gpu.call("activation_stats", xs[i], 6.0), count)})
    yield ROWS, _moving(Row(f"activation_stats {n}x{k}", times.microseconds()), times, 2 * n * k, limits)


def _moving(row: Row, times, nbytes: int, limits, must=None, aim=None) -> Row:
    row.compare("of the copy bandwidth", nbytes / times["qcli"] / limits["copy"], must, aim)
    if "bitsandbytes" in times:
        row.compare("faster than bitsandbytes", times["bitsandbytes"] / times["qcli"], None)
    return row
