"""Two processes make what one makes."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import qcli
from qcli.finetuning.ranks import Ranks
from tests.conftest import ROOT
from tests.finetuning.test_run import OPTIONS, base, data, quantized  # noqa: F401


@pytest.mark.parametrize("train", ["adapters", "weights"])
def test_two_processes_are_one(base, quantized, data, tmp_path, train):  # noqa: F811
    """With five rows a step, one has more of them than the other."""
    model, file = (base, "model.safetensors") if train == "weights" else (quantized, "adapter_model.safetensors")
    bits = 8 if train == "weights" else None
    options = {"bits": bits, "settings": {"train": train}} | OPTIONS | {"batch": 5, "lr": 1e-3, "steps": 4, "dtype": "float32"}
    one = qcli.finetune(str(model), data, tmp_path / "one", **options)
    arguments = ["-o", str(tmp_path / "two"), "--rank", "4", "--alpha", "8", "--steps", "4", "--batch", "5", "--lr", "1e-3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(29_000 + os.getpid() % 900), "-m", "qcli", "finetune", str(model), str(data)]
    arguments += ["--set", f"train={train}", *(["--bits", "8"] if bits else [])]
    command += [*arguments, "--max-tokens", "64", "--device", "cpu", "--dtype", "float32", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"losses"') == 1  # one process speaks
    expected, found = (load_file(tmp_path / name / file) for name in ("one", "two"))
    a, b = (torch.cat([t.flatten() for _, t in sorted(tensors.items())]) for tensors in (expected, found))
    assert (a - b).norm() <= 1e-4 * a.norm()
    assert one.steps == 4


@pytest.mark.parametrize("sizes, buffers", [((9_000_000, 5, 9_000_000, 7), 2), ((20_000_000, 3), 2), ((4, 5, 6), 1), ((), 0)])
def test_gradients_are_exchanged_in_buffers(monkeypatch, sizes, buffers):
    """Each comes back as the sum, however many share a buffer; a large one has its own. The loss is the last to be exchanged."""
    exchanged = []

    def doubled(tensor):
        exchanged.append(tensor.numel())
        tensor.mul_(2)

    monkeypatch.setattr(torch.distributed, "all_reduce", doubled)
    ranks = Ranks()
    ranks.count = 2
    gradients = [torch.full((size,), float(i + 1)) for i, size in enumerate(sizes)]
    total = torch.tensor(1.5)
    ranks.add(gradients, total)
    assert all(bool((gradient == 2 * (i + 1)).all()) for i, gradient in enumerate(gradients)) and total == 3
    assert len(exchanged) == buffers + 1 and sum(exchanged) == sum(sizes) + 1
