"""The order of rows, and batches that give the same sums however they are put together."""

import numpy as np
import pytest
import torch

import qcli
from qcli.finetuning import lora
from qcli.finetuning.batches import Order, batches_of
from qcli.finetuning.encoding import Row
from qcli.finetuning.loss import Loss, packs_rows
from qcli.finetuning.ranks import Ranks
from qcli.finetuning.settings import Options, Rare
from qcli.finetuning.training import Trainer
from tests.models import ARCHITECTURES, make_model


def random_rows(lengths, seed=0, vocabulary=250):
    generator = np.random.default_rng(seed)
    found = []
    for i, length in enumerate(lengths):
        trained = generator.random(length) < 0.7
        trained[0], trained[-1] = False, True
        found.append(Row(generator.integers(1, vocabulary, length).astype(np.int32), trained, f"line {i}"))
    return found


def test_each_epoch_reads_every_row_once_in_an_order_of_its_own():
    order = Order(10, 4, 3)
    assert order.steps_per_epoch == 3
    epochs = [sum((order.step(3 * epoch + i) for i in range(3)), []) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [len(order.step(i)) for i in range(3)] == [4, 4, 2]
    assert order.step(5) == Order(10, 4, 3).step(5) != Order(10, 4, 4).step(5)


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("most_rows", [None, 1, 2])
def test_every_row_is_in_one_batch(packs, most_rows):
    rows = random_rows([5, 9, 3, 12, 7, 7, 2])
    for batch in (found := batches_of(rows, packs, 16, most_rows, width=1 << 20)):
        assert batch.ids.numel() <= 16
    if packs and most_rows is None:
        assert any(batch.positions is not None for batch in found)
    assert sum(int(batch.trained.sum()) for batch in found) == sum(row.count for row in rows)
    seen = sorted(i for batch in found for i in batch.ids[batch.trained].tolist())
    assert seen == sorted(i for row in rows for i in row.ids[row.trained].tolist())


def test_packing_is_chosen_where_it_costs_less():
    even, ragged = random_rows([32] * 8), random_rows([100, 10, 10, 10, 10, 10, 10, 10])
    assert all(batch.positions is None for batch in batches_of(even, True, 256, None, width=64))
    assert any(batch.positions is not None for batch in batches_of(ragged, True, 256, None, width=4096))


def made(folder, packs=None, **rare):
    model, _ = qcli.load(str(folder), device="cpu", dtype="float32")
    adapted = lora.attach(model, lora.linear_modules(model), 4, 8, 0.0, False, 0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in lora.adapter_parameters(adapted).items():
        if ".lora_B." in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    loss = Loss(model, torch.device("cpu"), "m", rare.pop("checkpointed", False))
    options = Options(max_tokens=64, rare=Rare(grad_norm=0.0, **rare))
    return Trainer(model, loss, lora.adapter_parameters(model), options, packs_rows(loss) if packs is None else packs, Ranks())


def gradients(trainer, rows):
    trainer._sum(rows, 1 / sum(row.count for row in rows))
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters.values()])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_model("llama", folder, torch.float32)
    return folder


@pytest.mark.parametrize("at_a_time", [1, 2, 4, 8])
def test_the_step_is_the_same_however_ragged_rows_are_put_together(folder, at_a_time):
    rows = random_rows([5, 40, 3, 12, 27, 27, 2, 9])
    whole = gradients(made(folder, packs=False, sequences_at_a_time=1), rows)
    for packs in (False, True):
        trainer = made(folder, packs=packs, sequences_at_a_time=at_a_time)
        found = gradients(trainer, rows)
        assert (found - whole).norm() <= 1e-5 * whole.norm()


def test_checkpointing_changes_nothing(folder):
    rows = random_rows([5, 40, 3])
    assert torch.equal(gradients(made(folder, checkpointed=True), rows), gradients(made(folder), rows))


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ("t5", "bert")])
def test_a_row_does_not_see_another(name, tmp_path):
    """By whatever way the model's rows are put together, losses are those of each row alone, as transformers computes it."""
    model = make_model(name, tmp_path / name, torch.float32).eval()
    loss = Loss(model, torch.device("cpu"), name, checkpointing=False)
    rows = random_rows([20, 9, 14], vocabulary=200)
    expected = 0.0
    for row in rows:
        labels = torch.where(torch.from_numpy(row.trained), torch.from_numpy(row.ids).long(), -100)[None]
        ids = torch.from_numpy(row.ids).long()[None]
        expected += model(input_ids=ids, labels=labels).loss.item() * row.count
    for packs in {False, packs_rows(loss)}:
        batches = batches_of(rows, packs, 64, None, width=1 << 20)
        assert len(batches) == 1 and (batches[0].positions is not None) == packs
        assert float(loss(batches[0])) == pytest.approx(expected, rel=2e-5)


def test_models_that_keep_rows_apart_are_packed(folder):
    assert made(folder).packs
