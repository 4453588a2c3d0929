"""hqq_terms against the reference and float64. What hqq itself finds: tests/methods/test_hqq.py."""

import pytest
import torch

from qcli.ops.hqq_terms import _reference, cases, hqq_terms


def test_kernels_are_equal_to_the_reference():
    for case, arguments in cases():
        for ours, theirs in zip(hqq_terms(**arguments), _reference(**arguments)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=case)


def test_terms_are_those_of_the_formula():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    inverse, zero = torch.full((20, 1), 3.5), torch.full((20, 1), 7.25)
    terms, magnitudes, largest = hqq_terms(x, inverse, zero, 4)
    codes = (x.double() * 3.5 + 7.25).round().clamp(0, 15)
    torch.testing.assert_close(terms.double(), codes - x.double() * 3.5, rtol=0, atol=1e-5)
    torch.testing.assert_close(magnitudes.double(), (x.double() - (codes - 7.25) / 3.5).abs(), rtol=0, atol=1e-6)
    assert torch.equal(largest, magnitudes.amax(-1, keepdim=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_largest(bad):
    x = torch.zeros(3, 32)
    x[1, 5] = bad
    _, _, largest = hqq_terms(x, torch.ones(3, 1), torch.zeros(3, 1), 4)
    assert largest.isfinite().view(-1).tolist() == [True, False, True]


def test_what_is_refused():
    with pytest.raises(ValueError, match="zero is torch.float32"):
        hqq_terms(torch.zeros(2, 32), torch.ones(2, 1), torch.ones(2), 4)
    with pytest.raises(TypeError, match="x is torch.float64"):
        hqq_terms(torch.zeros(2, 32).double(), torch.ones(2, 1), torch.ones(2, 1), 4)
