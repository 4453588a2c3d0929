import pytest
import torch

from qcli.ops.norm import _kernel, cases, norm, record
from qcli.runtime import cpu

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def oracle(x, residual, weight, bias, eps, centered, factor):
    """torch's norms in float64, which have no residual."""
    total = x.double() * factor + (0 if residual is None else residual.double())
    n = (x.shape[-1],)
    weight, bias = (None if t is None else t.double() for t in (weight, bias))
    if centered:
        return torch.nn.functional.layer_norm(total, n, weight, bias, eps), total
    y = torch.nn.functional.rms_norm(total, n, weight, eps)
    return y if bias is None else y + bias, total


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_torchs_norms(name, arguments):
    x, residual = arguments["x"], arguments["residual"]
    dtypes = x.dtype, (x if residual is None else residual).dtype
    for ours, expected, dtype in zip(norm(**arguments), oracle(**arguments), dtypes):
        assert ours.dtype == dtype and ours.shape == x.shape
        assert ((ours.double() - expected).abs() <= HALF_ULP[dtype] * expected.abs() + 2e-6).all()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 80, 576, 4096, 5000])
@pytest.mark.parametrize("centered", [False, True])
def test_any_size(n, centered):
    x = 3 * torch.randn(3, n, generator=torch.Generator().manual_seed(n)) + 1
    y, total = norm(x, None, None, None, 1e-6, centered)
    torch.testing.assert_close(y.double(), oracle(x, None, None, None, 1e-6, centered, 1.0)[0], rtol=2e-6, atol=2e-6)
    assert torch.equal(total, x)


def test_nan_and_infinity_stay_in_their_row():
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    expected, _ = norm(x, None, None, None, 1e-5, False)
    x[1, 69], x[2, 0] = torch.nan, torch.inf
    y, _ = norm(x, None, None, None, 1e-5, False)
    assert torch.equal(y[[0, 3]], expected[[0, 3]]) and y[1].isnan().all()
    assert y[2, 0].isnan() and (y[2, 1:] == 0).all()


def test_the_shapes_of_residual_and_x_must_be_the_same():
    with pytest.raises((ValueError, RuntimeError)):
        norm(torch.zeros(2, 8), torch.zeros(3, 8), None, None, 1e-5, False)


class TestRecord:
    """What a program asks of the kernel beyond the op."""

    @pytest.fixture(autouse=True)
    def compiled(self, variant):
        if variant == cpu.REFERENCE:
            pytest.skip("there is no kernel")

    def test_the_residual_stream_and_x_change_in_place(self):
        generator = torch.Generator().manual_seed(0)
        x, residual = (torch.randn(3, 40, generator=generator) for _ in range(2))
        weight = torch.randn(40, generator=generator)
        y, total = norm(x, residual, weight, None, 1e-5, False, 0.5)
        made = record(x, x, residual=residual, sum=residual, weight=weight, eps=1e-5, centered=False, factor=0.5)
        _kernel(made.address, 3, 0)
        assert torch.equal(x, y) and torch.equal(residual, total)

    def test_the_sum_alone(self):
        x, residual, total = torch.ones(2, 20), torch.full((2, 20), 2.0), torch.zeros(2, 20)
        made = record(x, None, residual=residual, sum=total, eps=0.0, centered=False, factor=3.0)
        _kernel(made.address, 2, 0)
        assert (total == 5).all() and (x == 1).all() and (residual == 2).all()

    def test_without_a_place_for_the_sum(self):
        generator = torch.Generator().manual_seed(0)
        x, residual, y = (torch.randn(2, 33, generator=generator) for _ in range(3))
        made = record(x, y, residual=residual, eps=1e-5, centered=True)
        before = x.clone(), residual.clone()
        _kernel(made.address, 2, 0)
        assert torch.equal(y, norm(x, residual, None, None, 1e-5, True)[0])
        assert torch.equal(x, before[0]) and torch.equal(residual, before[1])

    def test_each_head_within_a_fused_projection(self):
        fused = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
        weight = torch.rand(20, generator=torch.Generator().manual_seed(1))
        before, heads = fused.clone(), fused[:, 40:120].view(3, 4, 20)
        expected, _ = norm(heads.contiguous(), None, weight, None, 1e-5, False)
        made = record(heads, heads, weight=weight, eps=1e-5, centered=False)
        _kernel(made.address, 2, 0)
        assert torch.equal(heads[:2], expected[:2])
        before[:2, 40:120] = expected[:2].view(2, 80)
        assert torch.equal(fused, before)  # nothing else, and not the third token

    @pytest.mark.parametrize("rows, n", [(1, 40000), (300, 300)])
    def test_threads_do_not_matter(self, rows, n, monkeypatch):
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(0))
        one = norm(x, x, None, None, 1e-5, True)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        assert all(map(torch.equal, norm(x, x, None, None, 1e-5, True), one))

    @pytest.mark.parametrize(
        "change, error, message",
        [
            ({"x": torch.zeros(2, 8).bfloat16()}, TypeError, "norm: x is torch.bfloat16, expected float32"),
            ({"y": torch.zeros(2, 9)}, ValueError, "norm: y is [2, 9], expected ['tokens', 8]"),
            ({"x": torch.zeros(2, 16)[:, ::2]}, ValueError, "norm: x has strides (16, 2), expected the elements of a"),
            ({"sum": torch.zeros(2, 16)[:, :8]}, ValueError, "norm: sum has strides (16, 1), expected contiguous tokens"),
            ({"weight": torch.zeros(7)}, ValueError, "norm: weight has 7 elements of torch.float32, expected 8 of torch.float32"),
            ({"bias": torch.zeros(8, device="meta")}, ValueError, "norm: bias is on meta, expected cpu"),
        ],
    )
    def test_what_does_not_fit(self, change, error, message):
        given = {"x": torch.zeros(2, 8), "y": torch.zeros(2, 8), "eps": 0.0, "centered": False} | change
        with pytest.raises(error) as raised:
            record(**given)
        assert str(raised.value).startswith(message)
