"""Every method's linear layer against the paper's formulas in float64, bitsandbytes, and the product that qcli runs."""

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch

from qcli import formats
from qcli.errors import UsageError
from qcli.methods import make
from qcli.methods.simulate import simulate
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.schemes import BY_TEXTS, NAMED, chosen, named
from tests.conftest import ROOT

THRESHOLD = 6.0
INT8 = [name for name, scheme in NAMED.items() if scheme.bits == 8 and scheme.codebook is None and name not in BY_TEXTS]


def simulated(name, weight):
    return simulate(make(NAMED[name]), weight)


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
    if name == "unquantized":
        y = x @ weight.T
    elif "llm" in name:
        outlier = np.abs(x) >= THRESHOLD
        columns = outlier.any(0)
        scale = 127 / np.where(outlier, 0, np.abs(x)).max(1, keepdims=True)
        ordinary = np.rint(np.where(columns, 0, x) * scale) / scale
        rounded = absmax(weight, 1)
        y = ordinary @ rounded.T
        y += x[:, columns] @ (weight if name.endswith("paper") else rounded)[:, columns].T
    else:
        rounding = zeropoint if "zeropoint" in name else absmax
        per_token, per_row = not name.endswith("per-tensor"), name in ("int8", "zeropoint")
        y = rounding(x, 1 if per_token else None) @ rounding(weight, 1 if per_row else None).T
    return torch.from_numpy(y + bias.double().numpy())


@pytest.mark.parametrize("name", ["unquantized", *INT8])
def test_equals_the_formulas_in_float64(name, layer):
    x, weight, bias = layer
    y = simulated(name, weight).linear(x, bias)
    for i, j in np.ndindex(2, 2):
        torch.testing.assert_close(y[i, j].double(), expected(name, x[i, j], weight, bias), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", NAMED)
def test_each_sequence_is_alone(name, layer):
    """Nothing of a sequence reaches another, whatever stands beside it."""
    x, weight, bias = layer
    prepared = simulated(name, weight)
    together = prepared.linear(x, bias)
    for i, j in np.ndindex(2, 2):
        assert torch.equal(together[i, j], prepared.linear(x[i, j], bias))
        assert torch.equal(together[i, j], prepared.linear(x[i : i + 1, j], bias)[0])


@pytest.mark.parametrize("name", NAMED)
def test_activations_and_weight_make_the_product(name, layer):
    x, weight = layer[0], layer[1].bfloat16()
    prepared = simulated(name, weight)
    for dtype in (torch.float32, torch.bfloat16):
        sequence = x[0, 0].to(dtype)
        rounded, kept = prepared.activations(sequence)
        assert rounded.dtype == torch.float32 and kept.shape == (128,)
        assert kept.nonzero().view(-1).tolist() == ([5] if name.startswith("llm-int8") else [])
        used = prepared.weight_for(kept, dtype)
        y = prepared.linear(sequence)
        assert y.dtype == dtype
        torch.testing.assert_close(
            y, (rounded.double() @ used.double().t()).to(dtype), rtol=1.6e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-6
        )
        if "llm" in name:
            columns = weight if name.endswith("paper") else prepared.weight.to(dtype)
            assert torch.equal(used[:, 5], columns[:, 5].float()) and torch.equal(rounded[:, 5], sequence[:, 5].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_stored_is_what_qcli_runs(dtype, layer):
    x, weight, bias = layer
    q, scale, _ = quantize_int8(weight, 0.0)
    y = simulated("llm-int8", weight).linear(x.to(dtype), bias)
    plain = simulated("int8", weight).linear(x.to(dtype), bias)
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
    y = simulated("int8", weight.float()).linear(x.float())  # its scales are of the weight's dtype, theirs of float32
    torch.testing.assert_close(y.double(), product, rtol=1e-5, atol=2e-6)


def test_decomposition_is_bitsandbytes(layer):
    x, weight = layer[0][0, 0].half(), layer[1].half()
    q_x, absmax_x, columns = bnb.int8_vectorwise_quant(x, threshold=THRESHOLD)
    q_w, absmax_w, _ = bnb.int8_vectorwise_quant(weight)
    assert columns.tolist() == [5]
    product = (q_x.double() @ q_w.double().t()) * absmax_x.double()[:, None] * absmax_w.double() / 127**2
    kept = x[:, columns].double()
    for name, source in (("llm-int8-paper", weight.double()), ("llm-int8", bnb.int8_vectorwise_dequant(q_w, absmax_w).double())):
        y = simulated(name, weight).linear(x.float())
        torch.testing.assert_close(y.double(), product + kept @ source[:, columns].t(), rtol=1e-5, atol=2e-6)


def test_nf4_is_bitsandbytes(layer):
    x, weight, bias = layer
    packed, state = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4", compress_statistics=False)
    theirs = bnb.dequantize_4bit(packed, state)
    prepared = simulated("nf4-plain", weight)
    assert torch.equal(prepared.weight, theirs)
    torch.testing.assert_close(prepared.linear(x, bias), torch.nn.functional.linear(x, theirs, bias), rtol=1e-5, atol=2e-6)
    for_bfloat16 = prepared.weight_for(torch.zeros(128, dtype=torch.bool), torch.bfloat16)
    assert torch.equal(for_bfloat16, theirs.bfloat16().float())


@pytest.mark.parametrize("name, quant_type, nested", [("nf4", "nf4", True), ("fp4-plain", "fp4", False)])
def test_other_4_bit_forms_are_near_bitsandbytes(name, quant_type, nested, layer):
    """Its CPU takes other codes in some ties, and a coarser table for the scales."""
    weight = layer[1].float()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=quant_type, compress_statistics=nested)
    theirs, ours = bnb.dequantize_4bit(packed, state), simulated(name, weight).weight
    differing = (ours - theirs).abs() > 1e-6
    assert differing.float().mean() < (0.01 if not nested else 0.1)
    assert (ours - theirs).norm() < 0.01 * weight.norm()
    plain = simulated("nf4-plain", weight).weight
    assert nested == (0 < (ours - plain).norm() < 0.05 * weight.norm())


def test_the_weight_counts_in_its_stored_dtype(layer):
    """The same values in float32 give the same, as values of bfloat16 are exact in it."""
    weight = layer[1].bfloat16()
    for name, scheme in NAMED.items():
        if scheme.scale == "model":
            continue  # its scales have the weight's dtype, as compressed-tensors stores them
        assert torch.equal(simulated(name, weight).weight, simulated(name, weight.float()).weight)


@pytest.mark.parametrize("name", NAMED)
def test_zeros_stay_zeros_and_nothing_crashes(name, layer):
    x, weight, bias = layer
    prepared = simulated(name, weight)
    assert not prepared.linear(torch.zeros(3, 128)).any()
    assert not simulated(name, torch.zeros(48, 128)).linear(x).any()
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
        assert simulated(name, broken).linear(x).shape == (2, 2, 40, 48)


def test_equal_values_have_no_range():
    constant = torch.full((3, 64), -2.75)
    for name in ("zeropoint-per-tensor", "zeropoint"):
        prepared = simulated(name, constant)
        assert torch.equal(prepared.weight, constant) and torch.equal(prepared.activations(constant)[0], constant)


def test_zeropoint_uses_the_range_that_absmax_leaves_idle():
    """Values of one sign: twice the levels, a quarter of the error (6 dB)."""
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))

    def error(name):
        return (simulated(name, x).weight - x).square().sum()

    assert 3.8 < error("int8-per-tensor") / error("zeropoint-per-tensor") < 4.2


@pytest.mark.parametrize(
    "name, bits",
    [
        ("unquantized", 16),
        ("int8-per-tensor", 8 + 32 / 2**24),
        ("int8-row-wise", 8 + 32 / 2**24),
        ("int8", 8 + 16 / 4096),
        ("zeropoint-per-tensor", 8 + 64 / 2**24),
        ("zeropoint", 8 + 64 / 4096),
        ("llm-int8", 8 + 32 / 4096),
        ("llm-int8-paper", 8 + 32 / 4096 + 7 * 16 / 4096),
        ("nf4-plain", 4 + 32 / 64),
        ("nf4", 4 + 8 / 64 + 32 / 64 / 256),
        ("fp4-plain", 4 + 32 / 64),
    ],
)
def test_bits_per_weight(name, bits):
    """Up to tables of the format, some hundred bytes a weight. The paper's form holds seven 16-bit columns besides."""
    weight = formats.Weight("weight", 4096, 4096, "BF16")
    found = 8 * formats.stored_bytes(NAMED[name], weight, outlier_columns=7) / 4096**2
    assert bits <= found < bits + 0.001


def test_bytes_are_those_on_disk(tmp_path):
    from safetensors import safe_open

    import qcli

    for method, name, options in (
        ("nf4", "nf4-plain", {"double_quant": False}),
        ("nf4", "nf4", {}),
        ("fp4", "fp4-plain", {"double_quant": False}),
        ("llm-int8", "llm-int8", {}),
    ):
        folder = tmp_path / name
        qcli.quantize(str(ROOT / "examples/demo-model"), folder, method=method, device="cpu", **options)
        with safe_open(folder / "model.safetensors", "pt") as file:
            module = "model.layers.2.mlp.down_proj."
            stored = [file.get_tensor(key) for key in file.keys() if key.startswith(module)]
        counted = formats.stored_bytes(NAMED[name], formats.Weight("weight", 128, 384, "BF16"))
        assert counted == sum(t.numel() * t.element_size() for t in stored)


def test_names_are_forgiving():
    for spelling, name in (
        ("NF4", "nf4"),
        ("nf4_plain", "nf4-plain"),
        ("LLM.int8()", "llm-int8"),
        ("LLM-int8-paper", "llm-int8-paper"),
        ("INT8 per_tensor", "int8-per-tensor"),
        (" Unquantized ", "unquantized"),
    ):
        assert named(spelling).name == name
    with pytest.raises(UsageError, match="no method 'nf5'; nearest: nf4"):
        named("nf5")
    with pytest.raises(UsageError, match="no method 'quux'$"):
        named("quux")


def test_lists_are_in_the_order_of_the_table():
    assert [m.name for m in chosen("all")] == [n for n in NAMED if n not in BY_TEXTS] and list(NAMED)[0] == "unquantized"
    assert [m.name for m in chosen("nf4, int8,NF4")] == ["unquantized", "int8", "nf4"]
    assert [m.name for m in chosen(["fp4", "unquantized"])] == ["unquantized", "fp4"]
    with pytest.raises(UsageError):
        chosen("nf4,,int8")
