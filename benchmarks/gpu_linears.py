"""A part of benchmarks/gpu.py: linear layers for few tokens. Reading the weight is the limit there."""

import copy
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from gpu_ops import ROWS
from gpu_timing import Candidate
from rows import Row

from qcli.ops.quantize_absmax import mean_absmax

UP_7B, UP_70B = (11008, 4096), (28672, 8192)
LAYERS = {
    "Llama 7B": ((4096, 4096), UP_7B, (4096, 11008)),
    "Llama 13B": ((5120, 5120), (13824, 5120)),
    "Llama 70B": ((1024, 8192), (8192, 8192), UP_70B),
    "OPT-175B": ((12288, 12288), (49152, 12288)),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
OUTLIERS = (5, 33, 100, 128, 200, 255)  # columns with an outlier

# Fractions of the copy bandwidth for one token, by layer: (required, aimed at).
ONE_TOKEN = {UP_7B: (0.45, 0.60), UP_70B: (0.65, 0.80)}


def layers(gpu) -> Iterator[tuple[str, tuple[int, int], int, int]]:
    """(name, shape in the model, shape as measured)."""
    every = [(model, shape) for model, shapes in LAYERS.items() for shape in shapes]
    for model, shape in every:
        if gpu.tiny and shape not in ONE_TOKEN:
            continue
        yield f"{model} {shape[0]}x{shape[1]}", shape, *gpu.layer(*shape)


def nf4(gpu, limits: dict[str, float]) -> Iterator[tuple[str, Row]]:
    """NF4 with double quantization."""
    for name, shape, n, k in layers(gpu):
        yield from nf4_layer(gpu, limits, name, shape, n, k)
        gpu.free()


def nf4_layer(gpu, limits, name: str, shape: tuple[int, int], n: int, k: int) -> Iterator[tuple[str, Row]]:
    """One layer, at every number of tokens."""
    weight = torch.randn(n, k, device=gpu.device).bfloat16()
    packed, absmax = gpu.call("quantize_4bit", weight, 64, "nf4")
    offset = mean_absmax(absmax)
    codes, nested = gpu.call("quantize_absmax", absmax, offset)
    streamed = packed.nbytes + codes.nbytes + nested.nbytes
    count, full = gpu.copies(streamed), gpu.copies(weight.nbytes)
    ours = [(packed.clone(), codes.clone(), nested.clone(), offset, None, 64, "nf4", n) for _ in range(count)]
    theirs = bnb.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = [copy.deepcopy(theirs) for _ in range(count)]
    weights = [weight.clone() for _ in range(full)]

    def candidates(x: torch.Tensor) -> dict[str, Candidate]:
        return {
            "qcli": Candidate(lambda i: gpu.call("linear_4bit", x, *ours[i], torch.bfloat16), count),
            "bitsandbytes": Candidate(lambda i: bnb.matmul_4bit(x, theirs[i][0].t(), theirs[i][1]), count),
            "bfloat16": Candidate(lambda i: torch.nn.functional.linear(x, weights[i]), full),
        }

    for tokens in TOKENS:
        times = gpu.time(candidates(torch.randn(tokens, k, device=gpu.device).bfloat16()))
        row = Row(f"NF4 {name}, {tokens} token{'s' * (tokens > 1)}", times.microseconds())
        must, aim, over_bitsandbytes, over_bfloat16 = None, None, None, None
        if shape in ONE_TOKEN and tokens == 1:
            (must, aim), over_bitsandbytes = ONE_TOKEN[shape], 1.5
        elif shape in ONE_TOKEN and tokens in (8, 32):
            aim, over_bitsandbytes, over_bfloat16 = 0.65, 1, 1
        nbytes = streamed + 2 * tokens * (n + k)
        row.compare("of the copy bandwidth", nbytes / times["qcli"] / limits["copy"], must, aim)
        row.compare("faster than bitsandbytes", times["bitsandbytes"] / times["qcli"], over_bitsandbytes)
        row.compare("faster than bfloat16", times["bfloat16"] / times["qcli"], over_bfloat16)
        yield ROWS, row


def int8(gpu, limits: dict[str, float]) -> Iterator[tuple[str, Row]]:
    """LLM.int8() with outliers, and the same weights with 16-bit activations: speed, and error against the exact product."""
    for name, shape, n, k in layers(gpu):
        yield from int8_layer(gpu, limits, name, shape, n, k)
        gpu.free()


def int8_layer(gpu, limits, name: str, shape: tuple[int, int], n: int, k: int) -> Iterator[tuple[str, Row]]:
    """One layer, for one token and for eight, with and without outliers."""
    weight = torch.randn(n, k, device=gpu.device) * 0.02
    q, scale, _ = gpu.call("quantize_int8", weight, 0.0)
    count, full = gpu.copies(q.nbytes), gpu.copies(2 * q.nbytes)
    stored, weights = [q.clone() for _ in range(count)], [weight.bfloat16() for _ in range(full)]
    theirs = [linear8bitlt(weight, gpu.device) for _ in range(count)]

    def candidates(x: torch.Tensor) -> dict[str, Candidate]:
        half = x.half()  # the input of their kernel: their cast is not timed
        return {
            "linear_int8": Candidate(lambda i: gpu.call("linear_int8", x, stored[i], scale, None, 6.0), count),
            "linear_w8a16": Candidate(lambda i: gpu.call("linear_w8a16", x, stored[i], scale, None), count),
            "bitsandbytes": Candidate(lambda i: theirs[i](half), count, False),
            "bfloat16": Candidate(lambda i: torch.nn.functional.linear(x, weights[i]), full),
        }

    for tokens in (1, 8):
        for outliers in ((), OUTLIERS):
            times = gpu.time(candidates(activations(gpu, tokens, k, outliers)))
            nbytes = q.nbytes + scale.nbytes + 2 * tokens * (n + k)
            row = Row(f"int8 {name}, {tokens} tok., {len(outliers)} outlier col.", times.microseconds())
            must, aim = (0.70, 0.85) if shape == UP_70B and tokens == 1 else (None, None)
            for ours in ("linear_int8", "linear_w8a16"):
                row.compare(f"{ours} of the copy bandwidth", nbytes / times[ours] / limits["copy"], must, aim)
                row.compare(f"{ours} faster than bitsandbytes", times["bitsandbytes"] / times[ours], None)
                row.compare(f"{ours} faster than bfloat16", times["bfloat16"] / times[ours], None)
            yield ROWS, row
    yield from errors(gpu, name, weight, q, scale, theirs[0])


def activations(gpu, tokens: int, columns: int, outliers: tuple[int, ...]) -> torch.Tensor:
    """Normal bfloat16 values, twenty times as large in the columns `outliers`."""
    x = torch.randn(tokens, columns, device=gpu.device)
    x[:, list(outliers)] *= 20
    return x.bfloat16()


def linear8bitlt(weight: torch.Tensor, device: torch.device) -> torch.nn.Module:
    """bitsandbytes' module with that weight, as transformers sets it up."""
    layer = bnb.nn.Linear8bitLt(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(device).eval()
    layer(torch.zeros(1, weight.shape[1], dtype=torch.float16, device=device))  # the first call sets up its state
    return layer


def errors(gpu, name: str, weight: torch.Tensor, q, scale, theirs) -> Iterator[tuple[str, Row]]:
    """Relative errors against float64: of the whole layer, and (computed with the stored weight) of its activations alone."""
    part = slice(0, 2048)  # only these rows: float64 is slow
    exact, stored = weight[part].double(), q[part].double() * (scale[part].double() / 127)[:, None]
    for outliers in ((), OUTLIERS):
        x = activations(gpu, 8, weight.shape[1], outliers)
        found = {
            "linear_int8": gpu.call("linear_int8", x, q, scale, None, 6.0),
            "linear_w8a16": gpu.call("linear_w8a16", x, q, scale, None),
            "bitsandbytes": theirs(x.half()),
            "bfloat16": torch.nn.functional.linear(x, weight.bfloat16()),
        }
        for against, matrix in (("the layer", exact), ("the stored weight", stored)):
            y = x.double() @ matrix.t()
            figures = {n: ((f[:, part].double() - y).norm() / y.norm()).item() for n, f in found.items()}
            row = Row(f"int8 {name}, {len(outliers)} outlier col., against {against}", figures)
            if matrix is stored:
                ratio = figures["linear_int8"] / figures["linear_w8a16"]
                row.compare("linear_w8a16 nearer than linear_int8", ratio, None)
            yield "relative error", row
