"""Fisher information of a streamed model beside autograd's squares on the whole one."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from qcli.calibration.backward import Backward
from qcli.calibration.fisher import FisherGatherer
from qcli.calibration.gather import Crew
from qcli.errors import NonFiniteError
from qcli.streaming.corpus import Window
from qcli.streaming.skeleton import Skeleton
from tests.models import add_tokenizer, make_model, make_tied

WINDOWS = [Window(tuple(range(3 + i, 43 + i - 5 * (i == 2))), 1, 40) for i in range(4)]  # the third is shorter


def linears(model) -> dict[str, torch.nn.Module]:
    kinds = {"Linear", "Conv1D"}
    return {n: m for n, m in model.named_modules() if type(m).__name__ in kinds and m is not model.get_output_embeddings()}


def streamed(folder, windows=WINDOWS) -> tuple[dict, float]:
    """Fisher of every linear module, and the loss."""
    skeleton = Skeleton(str(folder), dtype="float32", device="cpu")
    names, found = linears(skeleton.model), {}
    with Crew(skeleton.device) as crew:
        backward = Backward(skeleton, windows, crew)
        backward.through_head()
        for entered in reversed(backward.entered):
            skeleton.load(entered.unit)
            modules = {n: m for n, m in names.items() if n.startswith(f"{entered.unit.name}.")}
            gatherer = FisherGatherer(skeleton.device)
            with gatherer.listening(modules):
                backward.through(entered, gatherer.batch)
            skeleton.unload(entered.unit)
            found |= gatherer.found
    return found, backward.loss


def whole(folder, windows=WINDOWS) -> tuple[dict[str, torch.Tensor], float]:
    """The same by one backward pass of the whole model for each window, in which each position has a weight of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    modules = linears(model)
    own: dict[str, torch.Tensor] = {}

    def forward(name, x):
        module = modules[name]
        weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.t()
        own[name] = weight.detach().expand(x.numel() // x.shape[-1], -1, -1).clone().requires_grad_(True)
        y = torch.bmm(x.reshape(-1, 1, x.shape[-1]), own[name]).view(*x.shape[:-1], -1)
        return y if module.bias is None else y + module.bias

    for name, module in modules.items():
        module.forward = partial(forward, name)
    found, total = {name: 0.0 for name in modules}, 0.0
    for window in windows:
        ids = torch.tensor(window.ids)
        loss = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:], reduction="sum")
        loss.backward()
        total += loss.item()
        for name, weight in own.items():
            found[name] = found[name] + weight.grad.square().sum(0).t()
    return found, total


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "bloom", "gptj", "gpt_neox", "mixtral", "cohere"]
)
def test_it_is_autograds(name, tmp_path):
    make_model(name, tmp_path)
    add_tokenizer(tmp_path)
    (ours, loss), (theirs, total) = streamed(tmp_path), whole(tmp_path)
    assert loss == pytest.approx(total, rel=1e-6)
    assert ours.keys() == theirs.keys() and len(ours) >= 8
    for module, square in theirs.items():
        assert ours[module].tokens == sum(len(window.ids) for window in WINDOWS)
        torch.testing.assert_close(ours[module].square, square, rtol=2e-3, atol=1e-5 * float(square.max()), msg=module)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "tied"])
def test_of_one_position_it_is_the_square_of_the_gradient(name, tmp_path):
    """Windows of two tokens: the first predicts the second, and the second predicts nothing."""
    make_tied("llama", tmp_path) if name == "tied" else make_model(name, tmp_path)
    add_tokenizer(tmp_path)
    windows = [Window((7 * i, 11 * i + 5), 1, 1) for i in range(5)]
    ours, _ = streamed(tmp_path, windows)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    theirs = {module: 0.0 for module in linears(model)}
    for window in windows:
        ids = torch.tensor(window.ids)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :1], ids[1:]).backward()
        for module, found in linears(model).items():
            theirs[module] = theirs[module] + found.weight.grad.square()
    for module, square in theirs.items():
        square = square.t() if name == "gpt2" else square
        torch.testing.assert_close(ours[module].square, square, rtol=1e-3, atol=1e-5 * float(square.max()), msg=module)


def test_what_is_not_scored_has_no_loss(tmp_path):
    """A context is seen, and not predicted."""
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    ids = tuple(range(40))
    (_, all_of_it), (found, rest) = streamed(tmp_path, [Window(ids, 1, 39)]), streamed(tmp_path, [Window(ids, 30, 10)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        each = torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
    assert (all_of_it, rest) == (pytest.approx(each.sum().item(), rel=1e-5), pytest.approx(each[29:].sum().item(), rel=1e-5))
    assert all(fisher.tokens == 40 for fisher in found.values())


def test_it_does_not_depend_on_threads(tmp_path):
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    windows, found, before = [Window(tuple(range(i, i + 60)), 1, 60) for i in range(90)], [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(streamed(tmp_path, windows))
    finally:
        torch.set_num_threads(before)
    (one, loss), (three, same) = found
    assert loss == same and all(torch.equal(one[name].square, three[name].square) for name in one)


def test_code_between_blocks_takes_part(tmp_path, monkeypatch):
    """A sum of what several blocks gave, as models with shortcuts over blocks have it between them."""
    make_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    plain = LlamaModel.forward

    def with_shortcut(self, input_ids=None, **kwargs):
        kept = []
        handles = [
            self.layers[0].register_forward_hook(lambda module, args, output: kept.append(output)),
            self.norm.register_forward_pre_hook(lambda module, args: (args[0] + 0.5 * kept[0].square(),)),
        ]
        try:
            return plain(self, input_ids, **kwargs)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(LlamaModel, "forward", with_shortcut)
    (ours, loss), (theirs, total) = streamed(tmp_path, WINDOWS[:1]), whole(tmp_path, WINDOWS[:1])
    assert loss == pytest.approx(total, rel=1e-6)
    for module, square in theirs.items():
        torch.testing.assert_close(ours[module].square, square, rtol=2e-3, atol=1e-5 * float(square.max()), msg=module)


def test_a_loss_that_is_not_finite_is_refused(tmp_path):
    model = make_model("llama", tmp_path)
    add_tokenizer(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(NonFiniteError, match="loss"):
        streamed(tmp_path)
