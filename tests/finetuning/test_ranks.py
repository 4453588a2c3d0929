"""Two processes make the adapter that one makes."""

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

import qcli
from tests.conftest import ROOT
from tests.finetuning.test_run import OPTIONS, base, data, quantized  # noqa: F401


def test_two_processes_are_one(quantized, data, tmp_path):  # noqa: F811
    """With five rows a step, one has more of them than the other."""
    options = OPTIONS | {"batch": 5, "lr": 1e-3, "steps": 4, "dtype": "float32"}
    one = qcli.finetune(str(quantized), data, tmp_path / "one", **options)
    arguments = ["-o", str(tmp_path / "two"), "--rank", "4", "--alpha", "8", "--steps", "4", "--batch", "5", "--lr", "1e-3"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(29_000 + os.getpid() % 900), "-m", "qcli", "finetune", str(quantized), str(data)]
    command += [*arguments, "--max-tokens", "64", "--device", "cpu", "--dtype", "float32", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"losses"') == 1  # one process speaks
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    a, b = (torch.cat([t.flatten() for _, t in sorted(tensors.items())]) for tensors in (expected, found))
    assert (a - b).norm() <= 1e-4 * a.norm()
    assert one.steps == 4
