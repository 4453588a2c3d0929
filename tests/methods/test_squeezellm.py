"""SqueezeLLM's tables beside the best that dynamic programming finds, and what it keeps beside a direct computation."""

import numpy as np
import pytest
import torch

from qcli.errors import UsageError
from qcli.methods import make
from qcli.methods.simulate import simulate
from qcli.schemes import NAMED
from tests.ops.test_fit_table import best_error, error_of, weights_of


def fisher_of(rows, columns, seed=1):
    """Squares as gradients have them: of many magnitudes, larger in some columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).square() * (1 + 9 * torch.rand(columns, generator=generator) ** 2)


def encoded(method, weight, fisher, chunk):
    """All parts, and the errors, with so many rows in a chunk."""
    encoder, columns = method.encoder_by(fisher), weight.shape[1]
    starts = range(0, len(weight), chunk)
    codes = [encoder.feed(weight[i : i + chunk].flatten(), i * columns)["codes"] for i in starts]
    parts, errors = encoder.finish()
    return parts | {"codes": torch.cat(codes)}, errors


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_are_near_the_best_there_are(bits):
    """Under the weights of what is not kept. The best is exact: a dynamic program over the sorted elements of a row in float64."""
    weight, fisher = weights_of(12, 256), fisher_of(12, 256)
    method = make(NAMED["squeezellm"], {"bits": bits, "outliers": 0.02, "sensitive": 0.01, "entries": "float32"})
    parts, _ = encoded(method, weight, fisher, 5)
    assert parts["sparse_columns"].shape == (12, 8)
    mass = fisher.scatter(1, parts["sparse_columns"].long(), 0.0)
    best = torch.tensor([best_error(weight[i].numpy(), mass[i].numpy(), 1 << bits) for i in range(12)], dtype=torch.float64)
    ratio = error_of(weight, parts["table"], mass) / best
    assert ratio.min() > 1 - 1e-5 and ratio.mean() < 1.005, ratio
    unweighted = make(NAMED["kmeans"], {"bits": bits, "entries": "float32"}).encoder(12, 256, weight.device)
    unweighted.feed(weight.flatten(), 0)
    assert error_of(weight, unweighted.finish()[0]["table"], mass).sum() > 1.3 * error_of(weight, parts["table"], mass).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outliers, sensitive, counts", [(0.02, 0.01, (5, 3)), (0.0, 0.01, (0, 3)), (0.01, 0.0, (3, 0))])
def test_what_is_kept_beside(outliers, sensitive, counts, dtype):
    weight, fisher = weights_of(9, 260).to(dtype), fisher_of(9, 260)
    method = make(NAMED["squeezellm"], {"bits": 3, "outliers": outliers, "sensitive": sensitive})
    parts, errors = encoded(method, weight, fisher, 4)
    for row in range(9):
        magnitude, square = np.abs(weight[row].float().numpy()), fisher[row].numpy().copy()
        largest = np.argsort(-magnitude, kind="stable")[: counts[0]]
        square[largest] = 0
        wanted = sorted({*largest, *np.argsort(-square, kind="stable")[: counts[1]]})
        assert parts["sparse_columns"][row].tolist() == wanted
    assert parts["sparse_values"].dtype == dtype
    assert torch.equal(parts["sparse_values"], weight.gather(1, parts["sparse_columns"].long()))
    values = method.decode(parts, 9, 260)
    assert torch.equal(values.gather(1, parts["sparse_columns"].long()), parts["sparse_values"].float())
    assert errors.squared_error == pytest.approx((values - weight.float()).double().square().sum().item(), rel=1e-4)


def test_a_row_without_gradients_counts_its_weights_alike():
    weight, fisher = weights_of(4, 200), fisher_of(4, 200)
    fisher[2] = 0
    method = make(NAMED["squeezellm"], {"outliers": 0.02, "sensitive": 0.0})
    parts, _ = encoded(method, weight, fisher, 4)
    alike = simulate(method.without_texts(), weight).weight
    ours = method.decode(parts, 4, 200)
    assert [torch.equal(ours[row], alike[row]) for row in range(4)] == [False, False, True, False]


def test_without_gradients_nothing_is_kept_twice():
    weight, fisher = weights_of(4, 200), fisher_of(4, 200)
    weight[:, :3] = 9
    fisher[1] = 0
    fisher[2, 5:] = 0
    method = make(NAMED["squeezellm"], {"bits": 3, "outliers": 0.01, "sensitive": 0.02})
    parts, _ = encoded(method, weight, fisher, 4)
    assert parts["sparse_columns"].shape == (4, 6) and (parts["sparse_columns"].diff() > 0).all()
    assert parts["sparse_columns"][1:3, :2].tolist() == [[0, 1], [0, 1]]


def test_its_options():
    method = make(NAMED["squeezellm"], {"bits": 3})
    assert (method.scheme.sparse, method.scheme.bits, method.scheme.codebook) == (0.005, 3, "table")
    assert make(method.scheme) == method
    assert make(NAMED["squeezellm"], {"outliers": 0, "sensitive": 0}).scheme.sparse == 0
    for options in ({"bits": 5}, {"outliers": -0.1}, {"sensitive": 0.6}, {"outliers": 0.3, "sensitive": 0.3}, {"iterations": 0}):
        with pytest.raises(UsageError):
            make(NAMED["squeezellm"], options)
