import time

import bitsandbytes
import numpy as np
import pytest
import torch

from qcli.ops import linear_int8 as module
from qcli.ops.linear_int8 import cases, int8_product, linear_int8
from qcli.ops.quantize_int8 import quantize_int8

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def oracle(x, weight, scale, bias, threshold, fixed=None, original=None):
    """Equation 8 in integers and float64: the integer part, the outlier part, that of fixed columns and the bias, and the sum of
    all terms' magnitudes."""
    rows = x.double().numpy().reshape(-1, x.shape[-1])
    fixed = np.zeros(0, np.int64) if fixed is None else fixed.numpy().astype(np.int64)
    beside = np.zeros((len(weight), 0)) if original is None else original.to(x.dtype).double().numpy()
    of_fixed, rows = rows[:, fixed], rows.copy()
    rows[:, fixed] = 0
    q_w, s_w = weight.numpy().astype(np.int64), scale.numpy()
    outlier = np.abs(rows) >= threshold if threshold else np.zeros(rows.shape, bool)
    columns = outlier.any(0)
    s_x = np.where(outlier, 0, np.abs(rows)).max(1, keepdims=True)
    ordinary = np.where(columns, 0, rows).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        q_x = np.where(s_x > 0, np.rint(ordinary * (np.float32(1) / s_x.astype(np.float32) * np.float32(127))), 0).astype(np.int64)
    kept = torch.from_numpy(q_w[:, columns].astype(np.float32) * (s_w * np.float32(1 / 127))[:, None])
    kept = kept.to(x.dtype).double().numpy()
    step = s_x * s_w.astype(np.float64) / 127**2
    added = np.zeros(len(q_w)) if bias is None else bias.double().numpy()
    parts = (
        (q_x @ q_w.T) * step,
        rows[:, columns] @ kept.T,
        of_fixed @ beside.T,
        np.broadcast_to(added, step.shape),
        (np.abs(q_x) @ np.abs(q_w).T) * step
        + np.abs(rows[:, columns]) @ np.abs(kept).T
        + np.abs(of_fixed) @ np.abs(beside).T
        + np.abs(added),
    )
    return [torch.from_numpy(part.copy()).view(*x.shape[:-1], len(q_w)) for part in parts]


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_the_oracle(name, arguments):
    """Within a few float32 roundings of the sum, and half an ulp of the result's dtype."""
    y = linear_int8(**arguments)
    *parts, magnitude = oracle(**arguments)
    expected = sum(parts)
    assert y.dtype == arguments["x"].dtype and y.shape == expected.shape
    bound = expected.abs() * HALF_ULP[y.dtype] + magnitude * 2.0**-20
    assert y.isfinite().all() and ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize(
    "m, n, k", [(1, 64, 64), (3, 33, 65), (17, 8, 1), (1, 1, 1), (40, 24, 11008), (2, 16, 11008), (2, 5, 0), (0, 5, 8), (3, 0, 8)]
)
def test_the_integer_product_is_exact(m, n, k, fallback, device, monkeypatch):
    exact = module._int_mm_is_exact()
    monkeypatch.setattr(module, "_int_mm_pays", lambda: exact and not fallback)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    if m > 1 and n > 1:  # sums beyond 2^24 and odd, which float32 could not hold
        a[0], b[0], a[1], b[1] = 127, 127, -127, -128
        a[0, :1] = 126
    expected = torch.from_numpy(a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T)
    product = int8_product(a.to(device), b.to(device)).cpu()
    assert product.dtype == torch.int32 and torch.equal(product.long(), expected)


def test_a_product_that_saturates_is_found_out(monkeypatch):
    """As on processors that add pairs of products in int16."""

    def saturating(a, b):
        pairs = (a.int().unsqueeze(2) * b.int().unsqueeze(0)).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-32768, 32767).sum(1).int()

    assert module._int_mm_is_exact() in (True, False)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    assert module._int_mm_is_exact()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert saturating(torch.full((1, 4), 127), torch.full((4, 1), 127)).item() == 4 * 127**2
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: saturating(a.int() + 128, b) - 128 * b.int().sum(0))
    assert not module._int_mm_is_exact()


def test_a_product_slower_than_in_float32_is_not_taken(monkeypatch):
    """As on processors without VNNI."""
    product = torch._int_mm

    def slow(a, b):
        time.sleep(0.02)
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", slow)
    assert not module._int_mm_pays.__wrapped__()


def test_leading_dimensions_are_rows():
    generator = torch.Generator().manual_seed(0)
    weight, scale, _ = quantize_int8(torch.randn(7, 16, generator=generator), 0.0)
    x = torch.randn(2, 3, 4, 16, generator=generator)
    x[1, 2, 3, 5] = 8
    y = linear_int8(x, weight, scale, None, 6.0)
    assert y.shape == (2, 3, 4, 7)
    assert torch.equal(y.view(-1, 7), linear_int8(x.view(-1, 16), weight, scale, None, 6.0))
    assert linear_int8(x[:, :0], weight, scale, None, 6.0).shape == (2, 0, 4, 7)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_beyond_float16_are_finite(threshold, dtype):
    generator = torch.Generator().manual_seed(0)
    weight, scale, _ = quantize_int8(torch.randn(32, 64, generator=generator), 0.0)
    x = torch.randn(4, 64, generator=generator)
    x[:, 9] = 1e30
    y = linear_int8(x.to(dtype), weight, scale, None, threshold)
    assert y.isfinite().all() and (y.abs() > 1e25).any()


def test_outlier_columns_keep_16_bits():
    """One large feature among small ones: with the threshold the error falls to that of the small ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator)
    q, scale, _ = quantize_int8(weight, 0.0)
    x = torch.randn(32, 256, generator=generator)
    x[:, 3] = 200 + torch.rand(32, generator=generator)
    exact = x.double() @ (q.double() * scale.double().unsqueeze(1) / 127).t()
    errors = [(linear_int8(x, q, scale, None, t).double() - exact).square().mean().sqrt() for t in (0.0, 6.0)]
    assert errors[1] < errors[0] / 20


def test_nan_reaches_its_row_alone():
    weight, scale, _ = quantize_int8(torch.eye(4, 8), 0.0)
    x = torch.ones(3, 8)
    x[1, 2] = float("nan")
    for threshold in (0.0, 6.0):
        y = linear_int8(x, weight, scale, None, threshold)
        assert y[1].isnan().all() and torch.allclose(y[[0, 2]], torch.ones(2, 4))


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 10])
def test_close_to_bitsandbytes(threshold, rows):
    """Their constant is 1.8e-5 too large, and they round to float16 after the integer part, bias included, and again
    after the outliers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator).half()
    bias = torch.randn(64, generator=generator).half()
    q, scale, _ = quantize_int8(weight, 0.0)
    layer = bitsandbytes.nn.Linear8bitLt(128, 64, has_fp16_weights=False, threshold=threshold)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False)
    layer.bias.data = bias.clone()
    layer = layer.to("cpu").eval()
    x = torch.randn(rows, 128, generator=generator).half()
    x[:, 17] *= 12
    x[0, 17] = 20
    with torch.no_grad():
        theirs = layer(x).double()
    assert torch.equal(layer.state.SCB, scale)
    integer, outliers, _, added, _ = oracle(x, q, scale, bias, threshold)
    first, result = (integer + added).abs(), (integer + added + outliers).abs()
    bound = 1.81e-5 * integer.abs() + 1.01 * 2.0**-11 * (first + 2 * result) + 1e-6
    ours = linear_int8(x, q, scale, bias, threshold).double()
    assert ((ours - theirs).abs() <= bound).all()
