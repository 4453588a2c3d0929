"""Comparison with bitsandbytes' own CUDA kernels: the same codes, the same absmax, the same results up to rounding."""

import pytest
import torch

from qcli.ops.dequantize_4bit import dequantize_4bit
from qcli.ops.linear_4bit import linear_4bit
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_int8 import quantize_int8
from tests.gpu.checks import far_from_thresholds, moved
from tests.gpu.inputs import DTYPES, activations
from tests.parity import ROUNDING, disagreement

bnb = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("block_size", [64, 128, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_codes_and_absmax(quant_type, dtype, block_size, device):
    """Their kernel is compiled with fast arithmetic: its reciprocal may differ in the last bit, which matters if v is on a
    threshold."""
    x = torch.randn(512, 4096, device=device).to(dtype)
    packed, absmax = quantize_4bit(x, block_size, quant_type)
    theirs, state = bnb.functional.quantize_4bit(x, blocksize=block_size, quant_type=quant_type)
    assert torch.equal(absmax, state.absmax.view(-1))
    differ = (packed.view(-1) != theirs.view(-1)).float().mean().item()
    assert differ < 2e-3
    assert far_from_thresholds(x, packed, theirs, absmax, block_size, quant_type) == 0
    ours = dequantize_4bit(theirs, absmax, block_size, quant_type, list(x.shape), dtype)
    torch.testing.assert_close(ours, bnb.functional.dequantize_4bit(theirs, state), rtol=ROUNDING[dtype], atol=0)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_int8_codes_and_absmax(threshold, device):
    x = activations(300, 4096, torch.float16, outliers=9, device=device)
    q, absmax, outliers = quantize_int8(x, threshold)
    theirs, their_absmax, columns = bnb.functional.int8_vectorwise_quant(x, threshold=threshold)
    assert torch.equal(absmax, their_absmax.view(-1).float())
    if threshold:
        assert torch.equal(outliers.nonzero().view(-1), columns.view(-1).long())
    else:
        assert not outliers.any()
    kept = ~outliers
    apart = (q[:, kept].int() - theirs[:, kept].int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_of_a_linear4bit(dtype, quant_type, double_quant, device):
    n, k = 640, 2048
    layer = bnb.nn.Linear4bit(k, n, bias=True, compute_dtype=dtype, compress_statistics=double_quant, quant_type=quant_type)
    layer = layer.to(dtype).to(device).eval()
    state = layer.weight.quant_state
    absmax, nested_absmax, offset = state.absmax, None, 0.0
    if double_quant:
        nested_absmax, offset = state.state2.absmax, state.offset.item()
    weight = {
        "packed": layer.weight.data,
        "absmax": absmax,
        "nested_absmax": nested_absmax,
        "offset": offset,
        "bias": layer.bias.data,
        "block_size": state.blocksize,
        "quant_type": quant_type,
        "out_features": n,
        "compute_dtype": dtype,
    }
    weight = moved(weight, device)  # on a CPU their first call packs it again
    for tokens in (1, 4, 8, 32, 100):
        arguments = {"x": torch.randn(tokens, k, device=device).to(dtype), **weight}
        with torch.no_grad():
            theirs = layer(arguments["x"])
        assert disagreement("linear_4bit", arguments, linear_4bit(**arguments), theirs.cpu()) is None, tokens


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_results_of_a_linear8bitlt(threshold, device, product):
    n, k = 640, 2048
    layer = bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False, threshold=threshold)
    layer.weight = bnb.nn.Int8Params(torch.randn(n, k).half(), requires_grad=False, has_fp16_weights=False)
    layer.bias.data = torch.randn(n).half()
    layer = layer.to(device).eval()
    for tokens in (1, 8, 100):
        x = activations(tokens, k, torch.float16, outliers=7, device=device)
        with torch.no_grad():
            theirs = layer(x)
        arguments = {
            "x": x,
            "weight": layer.weight.data,
            "scale": layer.state.SCB.view(-1),
            "bias": layer.bias.data,
            "threshold": threshold,
        }
        assert disagreement("linear_int8", arguments, linear_int8(**arguments), theirs.cpu()) is None, tokens
