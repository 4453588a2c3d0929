"""What tokens count for modules, beside the gradients of the whole model, and the sums that they weigh."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from qcli.calibration.backward import Backward
from qcli.calibration.gather import Crew, Gatherer
from qcli.calibration.token_weights import TokenWeights
from qcli.streaming.corpus import Window
from qcli.streaming.skeleton import Skeleton
from tests.calibration.test_fisher import linears
from tests.models import add_tokenizer, make_model

# In a batch the first two of 60 tokens, then the shorter one: the batches of windows of one length, the longest first.
WINDOWS = [Window(tuple(range(i, i + 60 - 20 * (i == 1))), 1, 60) for i in range(3)]
BATCHES = [(0, 2), (1,)]


def streamed(folder) -> TokenWeights:
    skeleton, weights = Skeleton(str(folder), dtype="float32", device="cpu"), TokenWeights()
    names = linears(skeleton.model)
    with Crew(skeleton.device) as crew:
        backward = Backward(skeleton, WINDOWS, crew)
        backward.through_head()
        for entered in reversed(backward.entered):
            skeleton.load(entered.unit)
            with weights.listening({n: m for n, m in names.items() if n.startswith(f"{entered.unit.name}.")}):
                backward.through(entered, weights.batch)
            skeleton.unload(entered.unit)
    return weights


def whole(folder) -> dict[str, list[torch.Tensor]]:
    """Squared norms of the gradients at the outputs of every linear module, by batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name, module, args, output):
        output.retain_grad()
        outputs[name] = output

    for name, module in linears(model).items():
        module.register_forward_hook(partial(keep, name))
    found: dict[str, list[torch.Tensor]] = {name: [] for name in linears(model)}
    for batch in BATCHES:
        ids = torch.tensor([WINDOWS[i].ids for i in batch])
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
        for name in found:
            found[name].append(outputs[name].grad.square().sum(-1).flatten())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_they_are_squared_gradients_with_a_mean_of_one(name, tmp_path):
    make_model(name, tmp_path)
    add_tokenizer(tmp_path)
    ours, theirs = streamed(tmp_path), whole(tmp_path)
    for module, squares in theirs.items():
        mean = torch.cat(squares).mean()
        for batch in range(2):
            torch.testing.assert_close(ours.of([module], batch), squares[batch] / mean, rtol=2e-3, atol=1e-4, msg=module)
    assert ours.of(["model.nothing"], 0) is None


def test_modules_that_read_one_input_count_together(tmp_path):
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    names = [f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"]
    ours, theirs = streamed(tmp_path), whole(tmp_path)
    together = [sum(theirs[name][batch] for name in names) for batch in range(2)]
    for batch in range(2):
        wanted = together[batch] / torch.cat(together).mean()
        torch.testing.assert_close(ours.of([*names, "model.other"], batch), wanted, rtol=2e-3, atol=1e-4)
        assert torch.equal(ours.of(names[::-1], batch), ours.of(names, batch))
    ours.forget(names)
    assert ours.of(names, 0) is None


class Known(TokenWeights):
    """Two batches of three tokens, for `a` and `b`."""

    def __init__(self):
        super().__init__()
        self._squares = {
            "a": {0: torch.tensor([1.0, 0.0, 2.0]), 1: torch.tensor([4.0, 1.0, 1.0])},
            "b": {0: torch.tensor([0.0, 1.0, 1.0]), 1: torch.tensor([1.0, 0.0, 0.0])},
        }


def test_sums_of_squares_are_weighed_and_others_are_not():
    """a and b read one input, c another, of which nothing is known; in the second batch b meets fewer tokens than there were."""
    modules = torch.nn.ModuleDict({name: torch.nn.Linear(5, 4) for name in "abc"})
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(3, 5, generator=generator) for _ in range(2)]
    for with_hessian in ({"a", "b", "c"}, set()):
        gatherer = Gatherer(modules, with_hessian, torch.device("cpu"), token_weights=Known(), batches=64)
        for number, x in enumerate(xs):
            with gatherer.batch(number):
                modules["a"](x)
                modules["b"](x)
                modules["c"](x + 1)
        gatherer.close()
        weights = [torch.tensor([1.0, 1.0, 3.0]) / 2, torch.tensor([5.0, 1.0, 1.0]) / 2]
        for name, tokens, counts in (("a", xs, weights), ("c", [x + 1 for x in xs], [torch.ones(3)] * 2)):
            found = gatherer.found[name]
            products = sum(torch.einsum("t,ti,tj->ij", w.double(), x.double(), x.double()) for w, x in zip(counts, tokens))
            if with_hessian:
                torch.testing.assert_close(found.symmetric(), products.float())
            torch.testing.assert_close(found.mean_square, (products.diagonal() / 6).float())
            assert torch.equal(found.absmax, torch.cat(tokens).abs().amax(0)) and found.tokens == 6
            torch.testing.assert_close(found.magnitude, torch.cat(tokens).abs().double().sum(0), check_dtype=False)


def test_other_tokens_than_there_were_count_alike():
    """As where a router sends an expert others, once the blocks before it are rounded."""
    module, x = torch.nn.Linear(5, 4), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    gatherer = Gatherer({"a": module}, {"a"}, torch.device("cpu"), token_weights=Known(), batches=64)
    with gatherer.batch(0):
        module(x)
    gatherer.close()
    torch.testing.assert_close(gatherer.found["a"].symmetric(), x.t() @ x)
