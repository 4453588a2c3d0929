"""Tensors of more than 2^31 elements or bytes, too large for offsets of 32 bits. Parts all over the tensor are compared."""

from math import prod

import pytest
import torch

from qcli.ops.activation_stats import activation_stats
from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_int8 import quantize_int8
from tests.gpu.checks import reference, same_bits, wrong_in_rows
from tests.gpu.inputs import layer_4bit, layer_8bit, w8a16
from tests.parity import disagreement

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error::qcli.errors.QcliWarning")]

GIGABYTE = 10**9
BEYOND = 2**31


@pytest.fixture
def room(device):
    """Skips the test unless that many bytes are free."""

    def require(nbytes: int) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < nbytes:
            pytest.skip(f"needs {nbytes / GIGABYTE:.0f} GB of GPU memory, {free / GIGABYTE:.0f} GB are free")

    return require


def random(*shape: int, device: torch.device) -> torch.Tensor:
    """Normal bfloat16 values, generated piece by piece."""
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for part in x.view(-1).split(1 << 28):
        part.normal_()
    return x


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_quantization(quant_type, device, room):
    count, length = BEYOND + 64_010, 1 << 16  # the last block is partial
    room(count * 5)
    x = random(count, device=device)
    packed, absmax = quantize_4bit(x, 64, quant_type)
    back = dequantize_4bit(packed, absmax, 64, quant_type, [count], torch.bfloat16)
    last = (count - length) // 64 * 64
    for start in (0, BEYOND // 2 - length // 2, BEYOND - length // 2, last):
        part = x[start : start + length + 64].cpu()
        expected = reference("quantize_4bit", {"x": part, "block_size": 64, "quant_type": quant_type})
        end = start + len(part)
        ours = packed[start // 2 : (end + 1) // 2].cpu(), absmax[start // 64 : (end + 63) // 64].cpu()
        assert same_bits(ours, expected), start
        options = {"block_size": 64, "quant_type": quant_type, "shape": [len(part)], "dtype": torch.bfloat16}
        values = reference("dequantize_4bit", {"packed": ours[0], "absmax": ours[1], **options})
        assert same_bits(back[start:end].cpu(), values), start


def test_8_bit_quantization_and_statistics(device, room):
    columns, threshold = 4096, 5.0
    rows = BEYOND // columns + 1000
    room(rows * columns * 8)
    x = random(rows, columns, device=device)
    x[-1, 7] = 50.0  # found only if the kernel reaches the end
    x[:, 100:3000].clamp_(-4, 4)
    chosen = torch.tensor([0, 1, rows // 2, rows - 1001, rows - 1000, rows - 2, rows - 1])
    some = x[chosen.to(device)].cpu()
    q, absmax, outliers = quantize_int8(x, threshold)
    found = torch.stack([(part.abs() >= threshold).any(0) for part in x.split(1 << 15)]).any(0)
    assert torch.equal(outliers, found) and found[7] and not found.all()
    marks = torch.where(found.cpu(), 50.0, 0.0).bfloat16()[None]  # the reference then finds the same columns
    expected = [
        part[: len(chosen)] for part in reference("quantize_int8", {"x": torch.cat([some, marks]), "threshold": threshold})[:2]
    ]
    ours = q[chosen.to(device)].cpu(), absmax[chosen.to(device)].cpu()
    assert same_bits(ours, tuple(expected))
    back = dequantize_int8(q, absmax, torch.bfloat16)[chosen.to(device)].cpu()
    assert same_bits(back, reference("dequantize_int8", {"q": ours[0], "absmax": ours[1], "dtype": torch.bfloat16}))
    del q, back
    stats = activation_stats(x, threshold)
    few = torch.tensor([0, 7, 99, 3000, columns - 1])
    arguments = {"x": x[:, few.to(device)].cpu(), "threshold": threshold}
    expected = reference("activation_stats", arguments)
    assert disagreement("activation_stats", arguments, stats[:, few.to(device)].contiguous(), expected) is None


def ends(out_features: int) -> torch.Tensor:
    """Rows spread over the whole weight, including the first and the last."""
    return torch.linspace(0, out_features - 1, 60, dtype=torch.float64).long()


@pytest.mark.parametrize("nested", [False, True])
def test_a_4_bit_weight(nested, device, room):
    out_features, in_features = BEYOND // 512 + 5001, 1024
    room(4 * GIGABYTE)
    arguments = layer_4bit(1, out_features, in_features, torch.bfloat16, nested=nested, device=device)
    assert arguments["packed"].nbytes > BEYOND
    for tokens in (1, 8, 40):
        arguments["x"] = torch.randn(tokens, in_features, device=device).bfloat16()
        assert wrong_in_rows("linear_4bit", arguments, ends(out_features)) is None, tokens


def test_an_8_bit_weight(device, room, product):
    out_features, in_features = BEYOND // 1024 + 5001, 1024
    room(8 * GIGABYTE)
    arguments = layer_8bit(1, out_features, in_features, torch.bfloat16, device=device)
    assert arguments["weight"].nbytes > BEYOND
    for tokens in (1, 8, 40):
        arguments["x"] = torch.randn(tokens, in_features, device=device).bfloat16()
        arguments["x"][0, 5] = 30.0
        assert wrong_in_rows("linear_int8", arguments, ends(out_features)) is None, tokens
        if tokens <= 8:
            assert wrong_in_rows("linear_w8a16", w8a16(arguments), ends(out_features)) is None, tokens


def test_a_result(device, room, product):
    tokens, out_features = 1100, 2_000_008
    assert prod((tokens, out_features)) > BEYOND
    room(30 * GIGABYTE)
    arguments = layer_8bit(tokens, out_features, 64, torch.bfloat16, outliers=2, device=device)
    try:
        assert wrong_in_rows("linear_int8", arguments, ends(out_features)) is None
    except RuntimeError as e:
        if product == "fused" or "CUBLAS" not in str(e):
            raise
        pytest.skip(f"cuBLAS has no integer product of that size: {e}")
