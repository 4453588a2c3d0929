"""Hidden states that wait on the disk: when, with what result, and that nothing is left of them."""

import pytest
import torch

import qcli
from qcli.calibration.waiting import WaitingStates
from qcli.errors import CheckpointError
from qcli.process import available_memory
from qcli.quantization import calibration_needs, room
from qcli.quantization import quantize as verb
from qcli.streaming.batches import BATCH_TOKENS
from tests.models import add_tokenizer, make_model
from tests.quantization.test_calibrated import STORY, digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waiting")
    for name in ("llama", "gpt2"):
        make_model(name, folder / name)
        add_tokenizer(folder / name)
    (folder / "text.txt").write_text("".join(f"{i} {STORY[i % 60 :]}" for i in range(60)))
    return folder


def plan_of(folder, output, model="llama", **options):
    given = {"bits": 4, "calibrate": True, "text": folder / "text.txt", "tokens": 1500} | options
    return verb.make_plan(str(folder / model), output, **given)


def little_memory(monkeypatch, folder, tmp_path, model="llama"):
    """As much memory as a plan needs whose hidden states wait on the disk."""
    plan = plan_of(folder, tmp_path / "any", model)
    states = calibration_needs.calibration_needs(plan, 1).states
    monkeypatch.setattr(room, "available_memory", lambda: plan.working_memory + room.calibration_memory(plan) - states)
    return states


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("order", ["parallel", "sequential"])
def test_the_same_bytes(order, model, folder, tmp_path, monkeypatch):
    settings = {"order": order}
    verb.run_plan(plan_of(folder, tmp_path / "in-memory", model, settings=settings))
    little_memory(monkeypatch, folder, tmp_path, model)
    plan = plan_of(folder, tmp_path / "on-disk", model, settings=settings)
    assert plan.calibration.states_on_disk and not plan.problems
    kept = []
    keep = WaitingStates.keep
    monkeypatch.setattr(WaitingStates, "keep", lambda self, *given: kept.append(given[0]) or keep(self, *given))
    verb.run_plan(plan)
    assert kept and digest(tmp_path / "in-memory") == digest(tmp_path / "on-disk")


@pytest.mark.parametrize("options", [{"method": "squeezellm"}, {"settings": {"weights": "fisher"}}])
def test_the_same_bytes_by_gradients(options, folder, tmp_path, monkeypatch):
    """The states of all blocks wait then, each in a place of its own."""
    plan = plan_of(folder, tmp_path / "in-memory", **options)
    verb.run_plan(plan)
    states = calibration_needs.calibration_needs(plan, 1).states
    monkeypatch.setattr(room, "available_memory", lambda: plan.working_memory + room.calibration_memory(plan) - states)
    on_disk = plan_of(folder, tmp_path / "on-disk", **options)
    assert on_disk.calibration.states_on_disk and not on_disk.problems and on_disk.disk_bytes > plan.disk_bytes
    kept = []
    apart = WaitingStates.apart
    monkeypatch.setattr(WaitingStates, "apart", lambda self, output: kept.append(output.shape[-1]) or apart(self, output))
    verb.run_plan(on_disk)
    assert set(kept) == {64} and len(kept) % 3 == 0  # the embedding and two blocks give states
    assert digest(tmp_path / "in-memory") == digest(tmp_path / "on-disk")


def test_the_plan_says_so_and_counts_the_disk(folder, tmp_path, monkeypatch):
    before = plan_of(folder, tmp_path / "out")
    states = little_memory(monkeypatch, folder, tmp_path)
    plan = plan_of(folder, tmp_path / "out")
    assert any("hidden states of" in note and "wait on the disk" in note for note in plan.notes)
    assert plan.disk_bytes == before.disk_bytes + states * 3 // 2
    assert room.calibration_memory(plan) == room.calibration_memory(before) - states
    assert plan.identity == before.identity  # a run may go on either way
    free = room.available_memory()
    monkeypatch.setattr(room, "available_memory", lambda: free - 1)
    assert any("of memory, and" in problem for problem in plan_of(folder, tmp_path / "out").problems)
    assert available_memory() is None or not before.calibration.states_on_disk


def test_states_are_what_was_kept_and_leave_no_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    with WaitingStates(tmp_path) as waiting:
        assert not list(tmp_path.iterdir())
        first, second = (torch.randn(1, 50, 33, generator=generator) for _ in range(2))
        entered, other = waiting.keep(0, (first, None)), waiting.keep(1, second)
        left = waiting.keep(0, second + 1)
        assert torch.equal(entered[0], first) and entered[1] is None
        assert torch.equal(other, second) and torch.equal(left, second + 1)
        again = waiting.keep(0, first * 2)  # takes the place of what entered two blocks ago
        assert again.data_ptr() == entered[0].data_ptr() and torch.equal(again, first * 2)
        embedding = torch.nn.Embedding(5, 8).requires_grad_(False)
        with waiting.of_embedding(embedding):
            ids = torch.tensor([[1, 4, 2]])
            assert torch.equal(embedding(ids), embedding.weight[ids])
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write .*hidden-states"), WaitingStates(tmp_path / "none"):
        pass


def test_a_batch_has_as_many_tokens_as_the_estimate_takes():
    assert calibration_needs.BATCH == BATCH_TOKENS


def test_through_the_public_call(folder, tmp_path, monkeypatch):
    little_memory(monkeypatch, folder, tmp_path)
    report = qcli.quantize(str(folder / "llama"), tmp_path / "out", bits=4, calibrate=True, text=folder / "text.txt", tokens=1500)
    assert report.calibration.checked.kl < report.calibration.checked.plain_kl
    assert not list((tmp_path / "out").glob("*hidden*"))
