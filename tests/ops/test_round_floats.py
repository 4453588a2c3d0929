"""round_floats against arithmetic in float64 and torch's own E4M3, and each variant against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcli import codebooks
from qcli.ops.round_floats import _reference, cases, round_floats
from qcli.runtime import cpu
from tests.ops.test_kernels import matrices
from tests.ops.test_round_integers import normal, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [("fp8", 16, 1), ("fp8", 48, 5), ("mxfp4", 32, 1), ("nvfp4", 16, 1), ("nf3", 32, 1)]


def test_kernels_are_bit_equal_to_the_reference(variant):
    if variant == cpu.REFERENCE:
        pytest.skip("compares kernels with the reference")
    for case, arguments in cases():
        with cpu.using(None):
            expected = round_floats(**arguments)
        assert same(round_floats(**arguments), expected), case


@settings(max_examples=100, deadline=None, derandomize=True)
@given(matrices(), st.sampled_from(FORMS), st.sampled_from([1.0, 300.0, 1e-3, torch.inf]))
def test_any_matrix_is_bit_equal_to_the_reference(x, form, whole):
    name, size, height = form
    if name != "fp8":
        x = torch.nn.functional.pad(x, (0, -x.shape[1] % size))
    assert same(round_floats(x, name, size, height, whole), _reference(x, name, size, height, whole, None))


def widened(scale, size, height, x):
    return scale.double().repeat_interleave(size, 1)[:, : x.shape[1]].repeat_interleave(height, 0)[: len(x)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, height", [(300, 1), (128, 128), (64, 3)])
def test_fp8_is_the_nearest_e4m3(size, height, dtype):
    x = normal(130, 300).to(dtype)
    codes, scale, sums = round_floats(x, "fp8", size, height)
    s = widened(scale, size, height, x)
    quotient = (x.float() / s.float()).clamp(-448, 448)
    assert torch.equal(codes.view(torch.uint8), quotient.to(torch.float8_e4m3fn).view(torch.uint8))
    stored = (codes.double() * s).to(dtype).double()
    expected = torch.stack(((x.double() - stored).square().sum(), x.double().square().sum(), sums.new_zeros(())))
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)
    tiles = torch.nn.functional.pad(x.float().abs(), (0, -300 % size, 0, -130 % height)).unflatten(0, (-1, height))
    assert torch.equal(scale, (tiles.unflatten(-1, (-1, size)).amax((1, 3)) / 448).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, size, whole", [("mxfp4", 32, 1.0), ("nvfp4", 16, 700.0)])
def test_e2m1_is_the_nearest(form, size, whole, dtype):
    x = normal(30, 96).to(dtype)
    codes, scale, sums = round_floats(x, form, size, whole=whole)
    s = torch.exp2(scale.double() - 127) if form == "mxfp4" else scale.double() / whole
    s = widened(s, size, 1, x)
    table = torch.from_numpy(codebooks.E2M1).double()
    least = ((x.double() / s).unsqueeze(-1) - table).abs().amin(-1)
    assert ((x.double() / s - table[codes.int()]).abs() <= least + 1e-6).all()
    expected = torch.stack(((x.double() - table[codes.int()] * s).square().sum(), x.double().square().sum(), sums.new_zeros(())))
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", [False, True])
def test_nf3_is_the_nearest_of_the_table(given, dtype):
    x = normal(30, 192).to(dtype)
    scale = normal(30, 3).abs().to(dtype) + 1 if given else None
    codes, found, sums = round_floats(x, "nf3", 64, scale=scale)
    assert torch.equal(found, scale if given else x.unflatten(1, (3, 64)).abs().amax(-1))
    s, values = widened(found, 64, 1, x), torch.from_numpy(codebooks.NF3).double()
    distances = (x.double().unsqueeze(-1) / s.unsqueeze(-1) - values).abs()
    assert (distances.gather(-1, codes.long().unsqueeze(-1))[..., 0] <= distances.amin(-1) + 1e-6).all()
    expected = torch.stack(((x.double() - values[codes.int()] * s).square().sum(), x.double().square().sum(), sums.new_zeros(())))
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)


def test_nf3_halfway_is_the_lower_code():
    thresholds = torch.from_numpy(codebooks.NF3_THRESHOLDS)
    x = torch.cat((torch.ones(1), thresholds, torch.nextafter(thresholds, torch.ones(7)), torch.zeros(1)))[None]
    assert round_floats(x, "nf3", 16)[0].tolist() == [[7, *range(7), *range(1, 8), 3]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form, size, height", [("fp8", 32, 1), ("fp8", 32, 3), ("mxfp4", 32, 1), ("nvfp4", 32, 1), ("nf3", 32, 1)])
def test_non_finite_values_change_only_what_shares_their_scale(form, size, height, bad):
    x = normal(6, 64)
    clean, clean_scale, _ = round_floats(x, form, size, height)
    x[4, 40] = bad
    codes, scale, sums = round_floats(x, form, size, height)
    others = torch.ones(6, 2, dtype=torch.bool)
    others[4 // height * height : 4 // height * height + height, 1] = False
    assert torch.equal(codes.view(torch.uint8).view(6, 2, 32)[others], clean.view(torch.uint8).view(6, 2, 32)[others])
    assert sums[2] == 1
    kept = others[::height].view(scale.shape)
    assert torch.equal(scale.float()[kept], clean_scale.float()[kept])


def test_one_scale_is_given_for_all():
    x, scale = normal(4, 32), torch.full((1, 1), 0.25)
    codes, found, _ = round_floats(x, "fp8", 32, scale=scale)
    assert torch.equal(found, scale)
    assert torch.equal(codes.view(torch.uint8), (x / 0.25).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"form": "fp6"}, ValueError, "form is 'fp6', expected fp8, mxfp4, nvfp4, nf3"),
        ({"form": "nf3", "scale": torch.ones(2, 1)}, ValueError, "expected torch.float32 .2, 2."),
        ({"size": 48}, ValueError, "size is 48"),
        ({"height": 2}, ValueError, "height is 2, expected 1"),
        ({"form": "fp8", "height": 0}, ValueError, "height is 0, expected 1 or more"),
        ({"scale": torch.ones(1, 1)}, ValueError, "mxfp4 with a scale"),
        ({"form": "fp8", "scale": torch.ones(2, 1)}, ValueError, "expected torch.float32 .1, 1."),
        ({"x": torch.zeros(2, 64).int()}, TypeError, "x is torch.int32"),
    ],
)
def test_what_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        round_floats(**({"x": torch.zeros(2, 64), "form": "mxfp4", "size": 32} | change))
