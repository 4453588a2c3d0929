"""Memory stays bounded whatever the model, shard or tensor: VmHWM of a fresh process, less that of its libraries."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

MB = 1_000_000

# Prints how far the high-water mark of a process rose above interpreter and libraries.
MEASURE = """
import json, sys
import torch, transformers
from transformers import LlamaForCausalLM, BitsAndBytesConfig
import qcli, qcli.loading.load, qcli.checkpoint.source, qcli.quantization.execute, qcli.methods.nf4, qcli.methods.llm_int8
from qcli.process import peak_memory
torch.randn(64, 64) @ torch.randn(64, 64)
before = peak_memory()
{work}
print(json.dumps([peak_memory() - before, before]))
"""


def rise(work: str, cwd) -> int:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE.format(work=work)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    above, before = json.loads(done.stdout.splitlines()[-1])
    print(f"{work}: {above / MB:.0f} MB above {before / MB:.0f} MB")
    return above


def make(folder, **shapes) -> int:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from make_checkpoint import make_checkpoint

    return make_checkpoint(folder, **shapes)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """638 MB; its largest tensor has 134 MB."""
    folder = tmp_path_factory.mktemp("large")
    size = make(
        folder / "model", layers=1, hidden=4096, intermediate=16384, vocabulary=16384, heads=32, kv_heads=8, shard_size=400 * MB
    )
    assert size > 600 * MB
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_stays_within_its_bound(large, bits):
    from qcli.quantization.quantize import make_plan

    planned = make_plan(str(large / "model"), large / "planned", bits=bits).working_memory
    assert rise(f"qcli.quantize('model', 'out{bits}', bits={bits})", large) <= planned <= 300 * MB


ANONYMOUS = """
import re, threading, time
peak, stop = [0], threading.Event()
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)
start = anonymous()
threading.Thread(target=watch).start()
model, _ = qcli.load("model", bits=4, device="cpu")
stop.set()
weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
print(f"anonymous {peak[0] - start} weights {weights}")
"""


def test_loading_4_bits_never_holds_the_full_model(large):
    """Quantized while it is read, one weight at a time. Pages of the mapped file are the kernel's to take back, so what is
    measured is memory of the process's own (RssAnon)."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE.format(work=ANONYMOUS)]
    done = subprocess.run(command, cwd=large, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    own, weights = int(words[words.index("anonymous") + 1]), int(words[words.index("weights") + 1])
    print(f"loading with 4 bits: {own / MB:.0f} MB for {weights / MB:.0f} MB of weights")
    assert weights < 400 * MB
    assert own <= weights + 170 * MB  # the largest tensor has 134 MB


EIGHT_GB = {
    "layers": 14,
    "hidden": 4096,
    "intermediate": 14336,
    "vocabulary": 128256,
    "heads": 32,
    "kv_heads": 8,
    "shard_size": 5000 * MB,
}


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_an_8_gb_checkpoint_in_5_gb_shards(tmp_path, bits):
    size = make(tmp_path / "model", **EIGHT_GB)
    assert size > 8000 * MB
    assert rise(f"qcli.quantize('model', 'out', bits={bits})", tmp_path) <= 400 * MB


@pytest.mark.slow
def test_inspecting_an_8_gb_checkpoint(tmp_path):
    """A block has 436 MB, the embedding 1,051 MB; one linear layer in float32, as rounded and as it was, 2 x 235 MB."""
    from tests.models import add_tokenizer

    size = make(tmp_path / "model", **EIGHT_GB)
    add_tokenizer(tmp_path / "model")
    work = "qcli.inspect_outliers('model', tokens=512, sequence_length=512, device='cpu')"
    assert rise(work, tmp_path) <= 2000 * MB < size / 4
