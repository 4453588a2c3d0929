"""round_integers against arithmetic in float64, and each variant against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli.ops.round_integers import _reference, cases, round_integers
from qcli.runtime import cpu
from tests.ops.test_kernels import matrices
from tests.parity import bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, zero) for bits in (2, 3, 4, 8) for zero in (False, True)] + [(-127, 127, False)]


def same(ours, theirs):
    """The same bits, and sums within float64's rounding."""
    *found, sums = ours
    *expected, expected_sums = theirs
    torch.testing.assert_close(sums, expected_sums, rtol=1e-13, atol=0, equal_nan=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in zip(found, expected))


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_kernels_are_bit_equal_to_the_reference(variant):
    if variant == cpu.REFERENCE:
        pytest.skip("compares kernels with the reference")
    for case, arguments in cases():
        with cpu.using(None):
            expected = round_integers(**arguments)
        assert same(round_integers(**arguments), expected), case


@settings(max_examples=100, deadline=None, derandomize=True)
@given(matrices(), st.sampled_from([1, 7, 16, 32, 128]), st.sampled_from(FORMS))
def test_any_matrix_is_bit_equal_to_the_reference(x, size, form):
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % size))
    assert same(round_integers(x, size, *form), _reference(x, size, *form, None, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("least, most, zero_point", FORMS)
def test_codes_are_the_nearest_and_sums_are_those_of_float64(least, most, zero_point, dtype):
    x = normal(40, 128).to(dtype)
    x[:, ::7] *= 3
    codes, scale, zero, sums = round_integers(x, 32, least, most, zero_point)
    w, s = x.double().view(40, 4, 32), scale.double().unsqueeze(-1)
    z = zero.double().unsqueeze(-1) if zero_point else torch.zeros_like(s)
    c = codes.double().view(40, 4, 32)
    inside = ((w / s + z) > least) & ((w / s + z) < most)
    assert ((w / s + z - c).abs()[inside] <= 0.5 + 1e-4).all() and (c >= least).all() and (c <= most).all()
    stored = ((c - z) * s).to(dtype).double()  # one rounding: the product is exact in float64
    torch.testing.assert_close(
        sums, torch.stack(((w - stored).square().sum(), w.square().sum(), sums.new_zeros(()))), rtol=1e-6, atol=0
    )
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    ideal = (high - low) / (most - least) if zero_point else torch.maximum(-low, high) / ((most - least) / 2)
    torch.testing.assert_close(scale.double(), ideal, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_scales_are_used_and_returned(dtype):
    x, scale = normal(5, 64).to(dtype), (normal(5, 2).abs() + 0.1).to(dtype)
    zero = torch.arange(-5, 5).to(torch.int8).view(5, 2)
    codes, found, zeros, _ = round_integers(x, 32, -8, 7, True, scale, zero)
    assert torch.equal(found, scale) and torch.equal(zeros, zero)
    ideal = (x.float().view(5, 2, 32) / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)
    assert torch.equal(codes.float().view(5, 2, 32), ideal.clamp(-8, 7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("least, most, zero_point", FORMS)
def test_non_finite_values_change_only_their_group(least, most, zero_point, bad):
    x = normal(6, 64)
    clean = round_integers(x, 32, least, most, zero_point)
    x[2, 40] = bad
    found = round_integers(x, 32, least, most, zero_point)
    others = torch.ones(6, 2, dtype=torch.bool)
    others[2, 1] = False
    for a, b in zip(found[:3], clean[:3]):
        if a.numel():
            assert torch.equal(a.view(6, 2, -1)[others], b.view(6, 2, -1)[others])
    assert not found[1][2, 1].isfinite() and found[3][2] == 1
    assert found[3][1] == pytest.approx(float(x.double().view(6, 2, 32)[others].square().sum()))


def test_zeros_have_the_scale_eps():
    codes, scale, zero, sums = round_integers(torch.zeros(1, 32).half(), 32, -8, 7, True)
    assert scale.tolist() == [[torch.finfo(torch.float16).eps]] and zero.tolist() == [[-8]]
    assert codes.unique().tolist() == [-8] and sums.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"size": 5}, ValueError, "size is 5, expected a divisor of rows of 64"),
        ({"size": 0}, ValueError, "size is 0"),
        ({"least": -200}, ValueError, "codes lie in"),
        ({"x": torch.zeros(64)}, ValueError, "x has 1 dimensions"),
        ({"x": torch.zeros(2, 64).double()}, TypeError, "x is torch.float64"),
        ({"scale": torch.ones(2, 2)}, ValueError, "zero points are given with scales"),
        ({"zero": torch.ones(2, 2).to(torch.int8)}, ValueError, "zero points are given with scales"),
        ({"scale": torch.ones(2, 1), "zero": torch.ones(2, 2).to(torch.int8)}, ValueError, r"scale is torch.float32 \(2, 1\)"),
        ({"scale": torch.ones(2, 2), "zero": torch.ones(2, 2)}, ValueError, "zero is torch.float32"),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {"x": torch.zeros(2, 64), "size": 32, "least": -8, "most": 7, "zero_point": True}
    with pytest.raises(error, match=message):
        round_integers(**(arguments | change))
