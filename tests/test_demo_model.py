"""The bundled model is worth measuring: near the grammar's bound, with outlier features that int8 trips over."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qcli
from qcli.nn.linear_8bit import Linear8bit
from qcli.ops.linear_int8 import int8_product
from qcli.ops.quantize_int8 import quantize_int8

EXAMPLES = Path(__file__).parent.parent / "examples"
FOLDER = EXAMPLES / "demo-model"
THRESHOLD = 6.0


@pytest.fixture(scope="module")
def training():
    """The modules stories.py and train_demo_model.py."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("stories"), importlib.import_module("train_demo_model")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def held_out(training):
    """(token ids, nats the grammar spent) of stories that training never saw."""
    grammar = training[0]
    stories = grammar.stories(grammar.HELD_OUT_SEED, grammar.HELD_OUT_COUNT)
    _, tokenizer = qcli.load(str(FOLDER), device="cpu")
    ids = [[*tokenizer(s.text)["input_ids"], tokenizer.eos_token_id] for s in stories]
    return ids, sum(s.nats for s in stories)


def losses(model, ids) -> torch.Tensor:
    """Loss of every token, in nats, each story read on its own. float64."""
    out = []
    with torch.inference_mode():
        for story in ids:
            tokens = torch.tensor([story])
            logits = model(tokens[:, :-1]).logits[0].double()
            out.append(nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    return torch.cat(out)


@pytest.fixture(scope="module")
def base(held_out):
    """(model, its losses), in float32: so two runs differ by their quantization, not by the processor's bfloat16 sums."""
    model, _ = qcli.load(str(FOLDER), dtype="float32", device="cpu")
    return model, losses(model, held_out[0])


def paper_form(module: Linear8bit, weight: torch.Tensor):
    """The paper's product: outlier columns of x and of the original 16-bit weight, the rest in int8."""

    def forward(x):
        rows = x.reshape(-1, x.shape[-1])
        q, absmax, outliers = quantize_int8(rows, THRESHOLD)
        y = int8_product(q, module.weight).double() * absmax.double()[:, None] * module.SCB.double() / 127**2
        y += rows[:, outliers].double() @ weight[:, outliers].double().t()
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    return forward


@pytest.fixture(scope="module")
def costs(held_out, base):
    """name -> (mean loss added, its paired standard error)."""
    original, reference = base
    result = {}
    for name in ("plain int8", "llm-int8", "paper", "w8a16", "nf4"):
        model, _ = qcli.load(str(FOLDER), dtype="float32", device="cpu", bits=4 if name == "nf4" else 8)
        for path, module in model.named_modules():
            if isinstance(module, Linear8bit):
                module.threshold = 0.0 if name == "plain int8" else THRESHOLD
                module.rounds_activations = name != "w8a16"
                if name == "paper":
                    module.forward = paper_form(module, original.get_submodule(path).weight)
        added = losses(model, held_out[0]) - reference
        result[name] = added.mean().item(), (added.std() / math.sqrt(len(added))).item()
    print({name: f"{mean:+.5f} +- {error:.5f}" for name, (mean, error) in result.items()})
    return result


def test_perplexity_is_near_what_the_grammar_allows(held_out, base):
    ids, nats = held_out
    bound = nats / sum(len(story) - 1 for story in ids)
    loss = base[1].mean().item()
    assert bound - 0.02 < loss < bound + 0.08, (loss, bound)


def test_plain_int8_costs_at_least_two_percent_perplexity(costs):
    assert math.expm1(costs["plain int8"][0]) >= 0.02


def test_llm_int8_costs_at_most_a_third_of_it(costs):
    assert math.expm1(costs["llm-int8"][0]) <= math.expm1(costs["plain int8"][0]) / 3


def test_the_papers_form_costs_nothing_beyond_the_paired_error(costs):
    mean, error = costs["paper"]
    assert abs(mean) <= 2 * error


def test_whole_activations_cost_no_more_than_llm_int8(costs):
    assert costs["w8a16"][0] <= sum(costs["llm-int8"])


def test_nf4_costs_something_small(costs):
    assert 0.0005 < math.expm1(costs["nf4"][0]) < 0.1


def record_inputs(model, ids):
    """The inputs of attention and MLP: name -> [tokens, hidden]."""
    seen = {}

    def hook(name):
        return lambda module, args: seen.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]).float())

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "gate_proj"))
    ]
    losses(model, ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_a_few_dimensions_are_outliers_in_most_layers_and_positions(base, held_out, training):
    inputs = record_inputs(base[0], held_out[0][:20])
    share = torch.stack([(x.abs() >= THRESHOLD).float().mean(0) for x in inputs.values()])  # [sites, hidden]
    outliers = (share > 0.5).float().mean(0) > 0.5
    assert tuple(outliers.nonzero().view(-1).tolist()) == training[1].OUTLIER_DIMS
    assert share[:, ~outliers].mean() < 0.005


def test_the_outliers_carry_information(base, held_out, training):
    model, reference = base
    ids = held_out[0][:20]
    outliers = torch.tensor(training[1].OUTLIER_DIMS)
    others = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    others = others[~torch.isin(others, outliers)][: len(outliers)]
    count = sum(len(story) - 1 for story in ids)

    def loss_without(dims):
        def zero(module, args):
            x = args[0].clone()
            x[..., dims] = 0
            return (x,)

        names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        handles = [m.register_forward_pre_hook(zero) for n, m in model.named_modules() if n.endswith(names)]
        loss = losses(model, ids).mean().item()
        for handle in handles:
            handle.remove()
        return loss

    whole = reference[:count].mean().item()
    added, added_by_others = loss_without(outliers) - whole, loss_without(others) - whole
    assert added > 1.0 and added > 5 * added_by_others, (added, added_by_others)


def test_it_tells_a_story_to_its_end():
    model, tokenizer = qcli.load(str(FOLDER), device="cpu")
    ids = torch.tensor([tokenizer("Once")["input_ids"]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=200)[0].tolist()
    assert out[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(out, skip_special_tokens=True)
    assert text.strip().startswith("Once upon a time there was") and 200 < len(text) < 900


def test_the_grammar_counts_its_choices(training):
    def entropy(*weights):
        return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)

    def uniform(*counts):
        return sum(map(math.log, counts))

    hero = uniform(2, 10, 16) + entropy(6, 2, 2) + entropy(4, 1) + 0.8 * uniform(10) + uniform(8, 10)
    find = uniform(8, 12, 8, 6) + entropy(3, 1, 1)
    friend = uniform(2, 15) + 0.5 * (uniform(9) + uniform(10))
    end = entropy(2, 1, 1) + 0.25 * uniform(6) + entropy(2, 2, 1) + 0.8 * uniform(4)
    nats = torch.tensor([s.nats for s in training[0].stories(5, 4000)], dtype=torch.float64)
    assert abs(nats.mean() - (hero + find + friend + end)) <= 3 * nats.std() / math.sqrt(len(nats))


def test_another_seed_tells_other_stories(training):
    stories, again, other = ({s.text for s in training[0].stories(seed, 500)} for seed in (1, 1, 2))
    assert stories == again and len(stories) == 500 and not stories & other


def test_the_held_out_stories_come_as_a_file(training):
    grammar = training[0]
    file = (EXAMPLES / "stories.jsonl").read_text()
    stories = grammar.stories(grammar.HELD_OUT_SEED, grammar.HELD_OUT_COUNT)
    assert [json.loads(line) for line in file.splitlines()] == [{"text": story.text} for story in stories]
    script = subprocess.run([sys.executable, EXAMPLES / "stories.py"], capture_output=True, text=True, check=True)
    assert script.stdout == file


def test_training_sees_none_of_the_held_out_stories(training):
    grammar, train = training
    seen = {story.text for story in grammar.stories(train.TRAIN_SEED, 30_000)}
    held_out = {story.text for story in grammar.stories(grammar.HELD_OUT_SEED, grammar.HELD_OUT_COUNT)}
    assert len(held_out) == grammar.HELD_OUT_COUNT and not seen & held_out


def test_the_folder_is_small():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) <= 4_000_000


def test_calibrated_nf4_loses_nearly_nothing(training, base, held_out, tmp_path):
    """On stories of the grammar, of other seeds than training and measuring: README has the figures of 400 of them."""
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": s.text}) + "\n" for s in training[0].stories(3, 100)))
    changes = []
    for name, options in (("plain", {}), ("calibrated", {"calibrate": True, "text": tmp_path / "stories.jsonl", "check": False})):
        qcli.quantize(str(FOLDER), tmp_path / name, bits=4, **options)
        model, _ = qcli.load(str(tmp_path / name), dtype="float32", device="cpu")
        changes.append(float(losses(model, held_out[0]).mean() - base[1].mean()))
    assert changes[0] > 0.01 and changes[1] < 0.1 * changes[0]
