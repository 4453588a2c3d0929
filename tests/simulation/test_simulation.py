"""Every method's linear layer against the paper's formulas in float64, bitsandbytes, and the product that qcli runs."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from qcli.simulation import SIMULATIONS, chosen, simulation

from qcli.errors import UsageError
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.quantize_int8 import quantize_int8
from tests.conftest import ROOT

THRESHOLD = 6.0
INT8 = [name for name in SIMULATIONS if "int8" in name.lower()]


@pytest.fixture(scope="module")
def layer():
    """(x of four sequences of unlike size, weight, bias), with outlier columns that differ between the sequences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 40, 128, generator=generator) * torch.tensor([1, 2, 0.5, 1]).view(2, 2, 1, 1)
    x[..., 9] += 1.5
    x[0, 0, :, 5] *= 25
    x[1, 0, 3, 70] = -41.0
    weight = torch.randn(48, 128, generator=generator) * torch.linspace(0.02, 0.1, 48)[:, None]
    return x, weight, torch.randn(48, generator=generator)


def absmax(x, axis):
    """Rounded to 255 levels around zero, by one scale or by one for each row."""
    scale = 127 / np.abs(x).max(axis, keepdims=True)
    return np.rint(x * scale) / scale


def zeropoint(x, axis):
    """The paper's formula with the integers written out: shifted into [-127, 127], and back."""
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    nd = 2 * 127 / (high - low)
    zero_point = np.rint(nd * low) + 127
    q = np.rint(nd * x) - zero_point
    assert q.min() == -127 and q.max() == 127
    return (q + zero_point) / nd


def expected(name, x, weight, bias):
    """y of one sequence in float64."""
    x, weight = x.double().numpy(), weight.double().numpy()
    if name == "fp32":
        y = x @ weight.T
    elif "LLM" in name:
        outlier = np.abs(x) >= THRESHOLD
        columns = outlier.any(0)
        scale = 127 / np.where(outlier, 0, np.abs(x)).max(1, keepdims=True)
        ordinary = np.rint(np.where(columns, 0, x) * scale) / scale
        rounded = absmax(weight, 1)
        y = ordinary @ rounded.T
        y += x[:, columns] @ (weight if name.endswith("paper") else rounded)[:, columns].T
    else:
        rounding = zeropoint if "zeropoint" in name else absmax
        per_token, per_row = "row-wise" in name or "vector-wise" in name, "vector-wise" in name
        y = rounding(x, 1 if per_token else None) @ rounding(weight, 1 if per_row else None).T
    return torch.from_numpy(y + bias.double().numpy())


@pytest.mark.parametrize("name", ["fp32", *INT8])
def test_equals_the_formulas_in_float64(name, layer):
    x, weight, bias = layer
    y = SIMULATIONS[name].weight(weight).linear(x, bias)
    for i, j in np.ndindex(2, 2):
        torch.testing.assert_close(y[i, j].double(), expected(name, x[i, j], weight, bias), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", SIMULATIONS)
def test_each_sequence_is_alone(name, layer):
    """Nothing of a sequence reaches another, whatever stands beside it."""
    x, weight, bias = layer
    prepared = SIMULATIONS[name].weight(weight)
    together = prepared.linear(x, bias)
    for i, j in np.ndindex(2, 2):
        assert torch.equal(together[i, j], prepared.linear(x[i, j], bias))
        assert torch.equal(together[i, j], prepared.linear(x[i : i + 1, j], bias)[0])


@pytest.mark.parametrize("name", SIMULATIONS)
def test_activations_and_weight_make_the_product(name, layer):
    x, weight = layer[0], layer[1].bfloat16()
    prepared = SIMULATIONS[name].weight(weight)
    for dtype in (torch.float32, torch.bfloat16):
        sequence = x[0, 0].to(dtype)
        rounded, kept = prepared.activations(sequence)
        assert rounded.dtype == torch.float32 and kept.shape == (128,)
        assert kept.nonzero().view(-1).tolist() == ([5] if "LLM" in name else [])
        used = prepared.weight_for(kept, dtype)
        y = prepared.linear(sequence)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y, (rounded.double() @ used.double().t()).to(dtype), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-6
        )
        if "LLM" in name:
            columns = weight if name.endswith("paper") else prepared.weight.to(dtype)
            assert torch.equal(used[:, 5], columns[:, 5].float()) and torch.equal(rounded[:, 5], sequence[:, 5].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_stored_is_what_qcli_runs(dtype, layer):
    x, weight, bias = layer
    q, scale, _ = quantize_int8(weight, 0.0)
    y = SIMULATIONS["LLM.int8()"].weight(weight).linear(x.to(dtype), bias)
    plain = SIMULATIONS["int8 vector-wise"].weight(weight).linear(x.to(dtype), bias)
    step = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for i, j in np.ndindex(2, 2):
        run = linear_int8(x[i, j].to(dtype), q, scale, bias, THRESHOLD)
        torch.testing.assert_close(y[i, j], run, rtol=step, atol=2e-6)
        run = linear_int8(x[i, j].to(dtype), q, scale, bias, 0.0)
        torch.testing.assert_close(plain[i, j], run, rtol=step, atol=2e-6)


def test_vector_wise_is_bitsandbytes(layer):
    """Its int8 matrix product, where float16 represents the values."""
    x, weight = layer[0][0, 0].half(), layer[1].half()
    (q_x, absmax_x, _), (q_w, absmax_w, _) = bnb.int8_vectorwise_quant(x), bnb.int8_vectorwise_quant(weight)
    product = (q_x.double() @ q_w.double().t()) * absmax_x.double()[:, None] * absmax_w.double() / 127**2
    y = SIMULATIONS["int8 vector-wise"].weight(weight).linear(x.float())
    torch.testing.assert_close(y.double(), product, rtol=1e-5, atol=2e-6)


def test_decomposition_is_bitsandbytes(layer):
    x, weight = layer[0][0, 0].half(), layer[1].half()
    q_x, absmax_x, columns = bnb.int8_vectorwise_quant(x, threshold=THRESHOLD)
    q_w, absmax_w, _ = bnb.int8_vectorwise_quant(weight)
    assert columns.tolist() == [5]
    product = (q_x.double() @ q_w.double().t()) * absmax_x.double()[:, None] * absmax_w.double() / 127**2
    kept = x[:, columns].double()
    for name, source in (
        ("LLM.int8() paper", weight.double()),
        ("LLM.int8()", bnb.int8_vectorwise_dequant(q_w, absmax_w).double()),
    ):
        y = SIMULATIONS[name].weight(weight).linear(x.float())
        torch.testing.assert_close(y.double(), product + kept @ source[:, columns].t(), rtol=1e-5, atol=2e-6)


def test_nf4_is_bitsandbytes(layer):
    x, weight, bias = layer
    packed, state = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = bnb.dequantize_4bit(packed, state)
    prepared = SIMULATIONS["NF4"].weight(weight)
    assert torch.equal(prepared.weight, theirs)
    torch.testing.assert_close(prepared.linear(x, bias), torch.nn.functional.linear(x, theirs, bias), rtol=1e-5, atol=2e-6)
    for_bfloat16 = prepared.weight_for(torch.zeros(128, dtype=torch.bool), torch.bfloat16)
    assert torch.equal(for_bfloat16, theirs.bfloat16().float())


@pytest.mark.parametrize("name, quant_type, nested", [("NF4+DQ", "nf4", True), ("FP4", "fp4", False)])
def test_other_4_bit_forms_are_near_bitsandbytes(name, quant_type, nested, layer):
    """Its CPU takes other codes in some ties, and a coarser table for the scales."""
    weight = layer[1].float()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=nested)
    theirs, ours = bnb.dequantize_4bit(packed, state), SIMULATIONS[name].weight(weight).weight
    differing = (ours - theirs).abs() > 1e-6
    assert differing.float().mean() < (0.01 if not nested else 0.1)
    assert (ours - theirs).norm() < 0.01 * weight.norm()
    plain = SIMULATIONS["NF4"].weight(weight).weight
    assert nested == (0 < (ours - plain).norm() < 0.05 * weight.norm())


def test_the_weight_counts_in_its_stored_dtype(layer):
    """The same values in float32 give the same, as values of bfloat16 are exact in it."""
    weight = layer[1].bfloat16()
    for method in SIMULATIONS.values():
        assert torch.equal(method.weight(weight).weight, method.weight(weight.float()).weight)


@pytest.mark.parametrize("name", SIMULATIONS)
def test_zeros_stay_zeros_and_nothing_crashes(name, layer):
    x, weight, bias = layer
    method = SIMULATIONS[name]
    prepared = method.weight(weight)
    assert not prepared.linear(torch.zeros(3, 128)).any()
    assert not method.weight(torch.zeros(48, 128)).linear(x).any()
    assert prepared.linear(torch.empty(0, 128), bias).shape == (0, 48)
    assert prepared.linear(torch.randn(128)).shape == (48,)
    torch.testing.assert_close(prepared.linear(torch.full((2, 128), 1e-42)), torch.zeros(2, 48))
    for value in (torch.nan, torch.inf, 3e38):
        broken = torch.randn(2, 128)
        broken[1, 3] = value
        y = prepared.linear(broken)
        assert y.shape == (2, 48) and (value == 3e38 or not y[1].isfinite().all())
        broken = weight.clone()
        broken[4, 3] = value
        assert method.weight(broken).linear(x).shape == (2, 2, 40, 48)


def test_equal_values_have_no_range():
    constant = torch.full((3, 64), -2.75)
    for name in ("int8 zeropoint", "int8 zeropoint vector-wise"):
        prepared = SIMULATIONS[name].weight(constant)
        assert torch.equal(prepared.weight, constant) and torch.equal(prepared.activations(constant)[0], constant)


def test_zeropoint_uses_the_range_that_absmax_leaves_idle():
    """Values of one sign: twice the levels, a quarter of the error (6 dB)."""
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))

    def error(name):
        return (SIMULATIONS[name].weight(x).weight - x).square().sum()

    assert 3.8 < error("int8 per-tensor") / error("int8 zeropoint") < 4.2


@pytest.mark.parametrize(
    "name, bits",
    [
        ("fp32", 16),
        ("int8 per-tensor", 8 + 32 / 2**24),
        ("int8 row-wise", 8 + 32 / 2**24),
        ("int8 vector-wise", 8 + 32 / 4096),
        ("int8 zeropoint", 8 + 64 / 2**24),
        ("int8 zeropoint vector-wise", 8 + 64 / 4096),
        ("LLM.int8()", 8 + 32 / 4096),
        ("LLM.int8() paper", 8 + 32 / 4096 + 7 * 16 / 4096),
        ("NF4", 4 + 32 / 64),
        ("NF4+DQ", 4 + 8 / 64 + 32 / 64 / 256),
        ("FP4", 4 + 32 / 64),
    ],
)
def test_bits_per_weight(name, bits):
    """Up to tables of the format, some hundred bytes a weight. The paper's form holds seven 16-bit columns besides."""
    found = SIMULATIONS[name].bits_per_weight((4096, 4096), outlier_columns=7)
    assert bits <= found < bits + 0.001


def test_bytes_are_those_on_disk(tmp_path):
    from safetensors import safe_open

    import qcli

    for method, name, options in (
        ("nf4", "NF4", {"double_quant": False}),
        ("nf4", "NF4+DQ", {}),
        ("fp4", "FP4", {"double_quant": False}),
        ("llm-int8", "LLM.int8()", {}),
    ):
        folder = tmp_path / name
        qcli.quantize(str(ROOT / "examples/demo-model"), folder, method=method, device="cpu", **options)
        with safe_open(folder / "model.safetensors", "pt") as file:
            module = "model.layers.2.mlp.down_proj."
            stored = [file.get_tensor(key) for key in file.keys() if key.startswith(module)]
        assert SIMULATIONS[name].stored_bytes((128, 384)) == sum(t.numel() * t.element_size() for t in stored)


def test_names_are_forgiving():
    for spelling, name in (
        ("nf4-dq", "NF4+DQ"),
        ("llm.int8", "LLM.int8()"),
        ("LLM-int8-paper", "LLM.int8() paper"),
        ("vector-wise", "int8 vector-wise"),
        ("INT8 Zeropoint Vector_wise", "int8 zeropoint vector-wise"),
        (" FP32 ", "fp32"),
    ):
        assert simulation(spelling).name == name
    with pytest.raises(UsageError, match="no method 'nf5'; nearest: NF4"):
        simulation("nf5")
    with pytest.raises(UsageError, match="no method 'quux'$"):
        simulation("quux")


def test_lists_are_in_the_order_of_the_table():
    assert [m.name for m in chosen("all")] == list(SIMULATIONS) and list(SIMULATIONS)[0] == "fp32"
    assert [m.name for m in chosen("nf4, vector-wise,NF4")] == ["fp32", "int8 vector-wise", "NF4"]
    assert [m.name for m in chosen(["FP4", "fp32"])] == ["fp32", "FP4"]
    with pytest.raises(UsageError):
        chosen("nf4,,fp4")
