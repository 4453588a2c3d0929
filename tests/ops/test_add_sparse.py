import pytest
import torch

from qcli.ops.add_sparse import PreparedSparse, add_sparse, cases
from qcli.runtime import cpu

HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def dense(values, columns, offsets, in_features):
    """The matrix in float64."""
    matrix = torch.zeros(len(offsets) - 1, in_features, dtype=torch.float64)
    for n, (begin, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        for i in range(begin, end):
            matrix[n, columns[i]] += values[i].double()
    return matrix


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_the_dense_product(name, arguments):
    y, x, *matrix = (arguments[key] for key in ("y", "x", "values", "columns", "offsets"))
    found = y.clone()
    add_sparse(found, x, *matrix)
    weight = dense(*matrix, x.shape[-1])
    expected = y.double() + x.double() @ weight.t()
    bound = HALF_ULP[y.dtype] * expected.abs() + 2.0**-20 * (y.double().abs() + x.double().abs() @ weight.abs().t())
    assert ((found.double() - expected).abs() <= bound).all()


def test_an_element_may_be_there_twice():
    y = torch.zeros(1, 2)
    add_sparse(
        y, torch.tensor([[3.0, 5.0]]), torch.tensor([1.0, 10.0, 2.0]), torch.tensor([1, 1, 0]).int(), torch.tensor([0, 2, 3]).int()
    )
    assert y.tolist() == [[55.0, 6.0]]


def test_a_part_of_y_where_it_is():
    _, arguments = list(cases())[0]
    y = torch.zeros(3, 100)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    part, matrix = y[:, 10:50], [arguments[name] for name in ("values", "columns", "offsets")]
    add_sparse(part, x, *matrix)
    torch.testing.assert_close(part.double(), x.double() @ dense(*matrix, 64).t(), rtol=1e-5, atol=1e-5)
    assert not y[:, :10].any() and not y[:, 50:].any()


def test_gradients_are_those_of_the_dense_product():
    for name, arguments in list(cases())[1:8:2]:
        y, x, *matrix = (arguments[key] for key in ("y", "x", "values", "columns", "offsets"))
        factor = torch.ones_like(y, requires_grad=True)
        given = x.clone().requires_grad_()
        result = y * factor
        add_sparse(result, given, *matrix)
        found = torch.autograd.grad(result.square().sum(), (factor, given))
        exact, exact_x = torch.ones_like(y, dtype=torch.float64, requires_grad=True), x.double().requires_grad_()
        whole = y.double() * exact + exact_x @ dense(*matrix, x.shape[-1]).t()
        expected = torch.autograd.grad(whole.square().sum(), (exact, exact_x))
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"columns": torch.tensor([0, 4, 1]).int()}, "add_sparse: columns go from 0 to 4, expected 0 to 3"),
        ({"columns": torch.tensor([-1, 3, 1]).int()}, "add_sparse: columns go from -1 to 3, expected 0 to 3"),
        ({"offsets": torch.tensor([0, 4, 3]).int()}, "add_sparse: offsets go from 0 to 3, expected to ascend from 0 to 3"),
        ({"offsets": torch.tensor([0, 1, 2]).int()}, "add_sparse: offsets go from 0 to 2, expected to ascend from 0 to 3"),
        ({"columns": torch.tensor([0, 3, 1])}, "add_sparse: columns has 3 elements of torch.int64, expected 3 of torch.int32"),
        ({"values": torch.ones(2)}, "add_sparse: values has 2 elements"),
    ],
)
def test_what_does_not_fit(change, message):
    if cpu.variant() is None:
        pytest.skip("torch refuses it in its own words")
    given = {"values": torch.ones(3), "columns": torch.tensor([0, 3, 1]).int(), "offsets": torch.tensor([0, 2, 3]).int()}
    with pytest.raises(ValueError, match=message):
        PreparedSparse(4, **given | change)
    with pytest.raises(ValueError, match=message):
        add_sparse(torch.zeros(1, 2), torch.zeros(1, 4), **given | change)
