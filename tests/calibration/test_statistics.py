"""Sums over tokens: what they are, and that no number of threads changes a bit of them."""

import threading
import time
import weakref

import pytest
import torch
from torch import nn

from qcli.calibration import statistics
from qcli.calibration.gather import Crew, Gatherer
from qcli.calibration.statistics import PANEL, SAMPLE, SEGMENTS, Statistics, Turns, segment_of
from qcli.methods._gptq import factorized
from qcli.streaming.run import Pass


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [5, PANEL, PANEL + 3])
def test_sums_are_those_of_the_definition(columns):
    batches = [normal(tokens, columns, seed=tokens) for tokens in (7, 1, 40)]
    found = Statistics(columns, True, torch.device("cpu"))
    for x in batches:
        for panel in range(found.panels):
            found.add(x, panel)
    x = torch.cat(batches).double()
    assert found.tokens == 48
    torch.testing.assert_close(found.square, x.square().sum(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.magnitude, x.abs().sum(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(found.absmax, x.abs().amax(0).float())
    torch.testing.assert_close(found.symmetric().double(), x.t() @ x, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.mean_square.double(), x.square().mean(0), rtol=1e-6, atol=1e-6)
    assert found.is_finite


@pytest.mark.parametrize("batches", [1, 3, 8, 21])
def test_segments_summed_apart_give_the_same_bits(batches):
    """As machines do that take a segment each."""
    columns, device, count = PANEL + 3, torch.device("cpu"), min(SEGMENTS, batches)
    xs = [normal(5 + n % 3 * 300, columns, seed=n) * (n + 1) for n in range(batches)]
    whole = Statistics(columns, True, device, 3, True, count)
    apart = [Statistics(columns, True, device, 3, True, count) for _ in range(count)]
    for n, x in enumerate(xs):
        for panel in range(whole.panels):
            whole.add(x, panel, batch=n, segment=segment_of(n, batches))
            apart[segment_of(n, batches)].add(x, panel, batch=n)
    whole.end()
    for each in (whole, *apart):
        each.symmetric()
    merged = Statistics.of(apart[0].tensors())
    for each in apart[1:]:
        merged.merge(Statistics.of(each.tensors()))
    ours, theirs = whole.tensors(), merged.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    x = torch.cat(xs).double()
    torch.testing.assert_close(whole.hessian.double(), x.t() @ x, rtol=1e-4, atol=1e-3 * float((x**2).sum(0).max()))
    assert whole.tokens == len(x) and len(whole.magnitudes.magnitude) <= SAMPLE
    assert len({segment_of(n, batches) for n in range(batches)}) == count


def test_nan_is_seen():
    found = Statistics(3, False, torch.device("cpu"))
    found.add(torch.tensor([[1.0, torch.nan, 0.0]]), 0)
    assert not found.is_finite and found.hessian is None


class Block(nn.Module):
    """q and k read one input, o another; `rare` sees only the tokens of even batches."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o, self.rare = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x, number):
        hidden = self.q(x) + self.k(x)
        if number % 2 == 0:
            hidden = hidden + self.rare(hidden[:2])[:1]
        time.sleep(0.003 * (number % 3))  # threads do not finish in the order in which they begin
        return self.o(hidden.relu())


def gathered(threads):
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    gatherer = Gatherer(dict(block.named_children()), {"k", "o"}, torch.device("cpu"), batches=12)
    inputs = [normal(16, 8, seed=n) for n in range(12)]
    passes = [Pass(None, block, (x, n), {}) for n, x in enumerate(inputs)]
    crew = Crew(torch.device("cpu"))
    crew.threads = threads
    with crew:
        crew.gather(passes, gatherer)
        gatherer.close()
        outputs = list(crew.results([each.run for each in passes]))
    return gatherer.found, inputs, outputs


def test_the_same_bits_for_any_number_of_threads():
    one, inputs, outputs = gathered(1)
    several, _, again = gathered(5)
    assert one["q"] is one["k"] and one["q"] is not one["o"]
    assert one["q"].hessian is not None and one["rare"].hessian is None
    x = torch.cat(inputs)
    torch.testing.assert_close(one["q"].symmetric(), x.t() @ x, rtol=1e-5, atol=1e-4)
    assert one["rare"].tokens == 12 and one["q"].tokens == 192
    for name in one:
        assert torch.equal(one[name].square, several[name].square)
        assert torch.equal(one[name].absmax, several[name].absmax)
        if one[name].hessian is not None:
            assert torch.equal(one[name].symmetric(), several[name].symmetric())
    assert all(torch.equal(a, b) for a, b in zip(outputs, again))


def test_a_failed_batch_holds_up_no_other():
    def fail():
        raise RuntimeError("of the block")

    crew = Crew(torch.device("cpu"))
    crew.threads = 3
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    gatherer = Gatherer(dict(block.named_children()), {"q"}, torch.device("cpu"), batches=8)
    passes = [Pass(None, block, (normal(4, 8), n), {}) for n in range(8)]
    passes[3] = Pass(None, fail, (), {})
    with pytest.raises(RuntimeError, match="of the block"), crew:
        crew.gather(passes, gatherer)


def test_turns_are_taken_in_order():
    turns, order = Turns(), []

    def batch(number):
        with turns.batch(number):
            turns.wait(number, "key")
            order.append(number)
            turns.pass_on(number, "key")

    threads = [threading.Thread(target=batch, args=(number,)) for number in reversed(range(6))]
    for thread in threads:
        thread.start()
        time.sleep(0.002)
    for thread in threads:
        thread.join(10)
    assert order == list(range(6))


def test_a_factor_is_made_once_for_all_that_are_expected_to_ask(monkeypatch):
    """By each damping. After the last of them it is let go, and made again for one that nobody expected."""
    made = []
    monkeypatch.setattr(statistics, "factorized", lambda hessian, damping: made.append(damping) or factorized(hessian, damping))
    found = Statistics(8, True, torch.device("cpu"))
    found.add(normal(40, 8), 0)
    hessian = found.symmetric()
    for damping in (0.1, 0.1, 0.1, 0.2):
        found.expect_factor(damping)
    factors = [found.factor(damping) for damping in (0.1, 0.2, 0.1, 0.1)]
    assert made == [0.1, 0.2] and factors[0] is factors[2] is factors[3]
    for factor, damping in zip(factors, (0.1, 0.2)):
        expected = factorized(hessian, damping)
        assert torch.equal(factor.upper, expected.upper) and torch.equal(factor.order, expected.order)
    let_go = weakref.ref(factors[0])
    del factors, factor
    assert let_go() is None
    found.factor(0.1)
    found.factor(0.1)
    assert made == [0.1, 0.2, 0.1, 0.1]
