"""The ops rows of benchmarks/cpu.py: a layer of 11008 x 4096 (the MLP of a 7B Llama)."""

import copy

import bitsandbytes as bnb
import bitsandbytes.functional as bnb_functional
import torch
from measure import alternate, copies

from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.linear_4bit import linear_4bit
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.ops.quantize_int8 import quantize_int8

N, K = 11008, 4096
WEIGHTS = N * K


def milliseconds(times: dict[str, float]) -> dict[str, float]:
    """The times in milliseconds, for the table."""
    return {name: 1e3 * value for name, value in times.items()}


def nf4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Packed codes, absmax codes, nested absmax and offset."""
    packed, absmax = quantize_4bit(x, 64, "nf4")
    offset = mean_absmax(absmax)
    return packed, *quantize_absmax(absmax, offset), offset


def run(row) -> list:
    """The rows."""
    torch.manual_seed(0)
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        return [*quantize_rows(row), *dequantize_rows(row), *linear_4bit_rows(row), *linear_int8_rows(row)]


def read_bandwidth() -> float:
    """Bytes per second at which nn.Linear in float32 reads its weight for one token."""
    weight, x = torch.randn(N, K), torch.randn(1, K)
    full = copies(lambda: weight.clone(), 4 * WEIGHTS)
    with torch.inference_mode():
        return 4 * WEIGHTS / alternate({"": lambda: torch.nn.functional.linear(x, full())}, 30)[""]


def quantize_rows(row):
    """NF4 with double quantization, and row-wise int8, compared with copying and bitsandbytes."""
    x = copies(lambda: torch.randn(N, K).bfloat16(), 2 * WEIGHTS)
    four = alternate(
        {
            "clone": lambda: x().clone(),
            "qcli": lambda: nf4(x()),
            "bitsandbytes": lambda: bnb_functional.quantize_4bit(x(), blocksize=64, compress_statistics=True, quant_type="nf4"),
        },
        5,
    )
    eight = alternate(
        {
            "clone": lambda: x().clone(),
            "qcli": lambda: quantize_int8(x(), 0.0),
            "bitsandbytes": lambda: bnb_functional.int8_vectorwise_quant(x().half()),
        },
        7,
    )
    yield (
        row("quantize NF4 + double quantization, bfloat16", milliseconds(four))
        .compare("time / clone", four["qcli"] / four["clone"], 4, 2, at_most=True)
        .compare("faster than bitsandbytes", four["bitsandbytes"] / four["qcli"], 30)
    )
    yield (
        row("quantize int8 row-wise, bfloat16", milliseconds(eight))
        .compare("time / clone", eight["qcli"] / eight["clone"], 3, 1.5, at_most=True)
        .compare("faster than bitsandbytes", eight["bitsandbytes"] / eight["qcli"], 20)
    )


def dequantize_rows(row):
    """NF4 to bfloat16 and float32, compared with cloning the result."""
    weight = torch.randn(N, K)
    packed, absmax = quantize_4bit(weight, 64, "nf4")
    some = copies(lambda: (packed.clone(), absmax.clone()), packed.nbytes + absmax.nbytes)
    for dtype in (torch.bfloat16, torch.float32):
        result = copies(lambda dtype=dtype: weight.to(dtype, copy=True), weight.to(dtype).nbytes)
        state = bnb_functional.QuantState(absmax, torch.Size((N, K)), None, 64, "nf4", dtype)
        times = alternate(
            {
                "clone": lambda result=result: result().clone(),
                "qcli": lambda dtype=dtype: dequantize_4bit(*some(), 64, "nf4", [N, K], dtype),
                "bitsandbytes": lambda state=state: bnb_functional.dequantize_4bit(packed, state),
            },
            9,
        )
        yield (
            row(f"dequantize NF4 to {str(dtype)[6:]}", milliseconds(times))
            .compare("time / clone", times["qcli"] / times["clone"], 1.5, 1, at_most=True)
            .compare("faster than bitsandbytes", times["bitsandbytes"] / times["qcli"], None)
        )


def linear_4bit_rows(row):
    """One and 128 tokens. bitsandbytes is timed on its common path, and on its fused path if the CPU has AVX512_BF16."""
    weight = torch.randn(N, K)
    packed, absmax, nested, offset = nf4(weight)
    stored = copies(lambda: (packed.clone(), absmax.clone(), nested.clone()), packed.nbytes + absmax.nbytes)
    streamed = packed.nbytes + absmax.nbytes + nested.nbytes
    full = copies(lambda: weight.clone(), 4 * WEIGHTS)
    has_fused = bnb.nn.modules.has_avx512bf16()
    for tokens, rounds in ((1, 40), (128, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, K)
            ready = x.to(dtype)
            times = alternate(
                {
                    "nn.Linear float32": lambda x=x: torch.nn.functional.linear(x, full()),
                    "qcli": lambda x=ready, dtype=dtype: linear_4bit(x, *stored(), offset, None, 64, "nf4", N, dtype),
                },
                rounds,
            )
            times |= theirs_4bit(weight, ready, dtype, has_fused)
            name = f"linear_4bit NF4, {tokens} token{'s' if tokens > 1 else ''}, {str(dtype)[6:]}"
            found = row(name, milliseconds(times))
            float32, ours, common = times["nn.Linear float32"], times["qcli"], times["bitsandbytes"]
            if tokens == 1:
                reading = 4 * WEIGHTS / float32
                found.compare("faster than nn.Linear float32", float32 / ours, 3)
                found.compare("faster than bitsandbytes", common / ours, 25)
                found.compare("read bandwidth / nn.Linear's", streamed / ours / reading, 0.5, 0.8)
            else:
                found.compare("time / nn.Linear float32", ours / float32, 1.2, 1, at_most=True)
                found.compare("faster than bitsandbytes", common / ours, 1.5)
            if has_fused:
                found.compare("faster than its AVX512_BF16 path", times["bitsandbytes fused"] / ours, None)
            yield found


def theirs_4bit(weight: torch.Tensor, x: torch.Tensor, dtype: torch.dtype, has_fused: bool) -> dict[str, float]:
    """bitsandbytes' Linear4bit with the same weight. One layer suffices: its own traffic evicts the weight from the cache."""
    times = {}
    for name in ("bitsandbytes", "bitsandbytes fused") if has_fused else ("bitsandbytes",):
        bnb.nn.modules.has_avx512bf16 = lambda name=name: name.endswith("fused")
        layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer = layer.to("cpu").eval()
        times[name] = alternate({"": lambda layer=layer: layer(x)}, 5)[""]
    return times


def linear_int8_rows(row):
    """LLM.int8() with three outlier columns."""
    weight = torch.randn(N, K) * 0.02
    q, scale, _ = quantize_int8(weight, 0.0)
    stored = copies(lambda: q.clone(), WEIGHTS)
    layer = bnb.nn.Linear8bitLt(K, N, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layers = copies(lambda: _copy(layer.to("cpu").eval()), WEIGHTS)
    for tokens, rounds in ((1, 40), (128, 15)):
        x = torch.randn(tokens, K).bfloat16()
        x[:, [5, 77, 900]] *= 20
        times = alternate(
            {"qcli": lambda x=x: linear_int8(x, stored(), scale, None, 6.0), "bitsandbytes": lambda x=x: layers()(x)}, rounds
        )
        yield row(f"linear_int8, {tokens} token{'s' if tokens > 1 else ''}, 3 outlier columns", milliseconds(times)).compare(
            "faster than bitsandbytes", times["bitsandbytes"] / times["qcli"], 1, 1.3
        )


def _copy(layer):
    """Another Linear8bitLt with the same weight in its own memory. Its first call quantizes it."""
    layer(torch.zeros(1, K, dtype=torch.bfloat16))
    return copy.deepcopy(layer)
