"""A whole model with the CUDA kernels on the emulator gives the same logits as with the CPU kernels."""

import pytest
import torch

import qcli
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit
from qcli.ops import linear_4bit, linear_int8, linear_w8a16
from qcli.runtime import cuda
from tests.conftest import ROOT
from tests.emulator.emulator import Emulator, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module")
def emulator(emulated):
    return Emulator(emulated)


@pytest.mark.parametrize(
    "bits, int8_activations, kernels",
    [
        (4, True, {"linear_4bit.cu: linear_4bit"}),
        (8, True, {"linear_int8.cu: linear_int8"}),
        (8, False, {"linear_w8a16.cu: linear_w8a16"}),
    ],
)
def test_logits_of_the_demo_model(bits, int8_activations, kernels, emulator, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    options = {"block_size": 32} if bits == 4 else {}  # divides every layer's columns
    qcli.quantize(str(ROOT / "examples/demo-model"), folder, bits=bits, dtype="bfloat16", device="cpu", **options)
    model, tokenizer = qcli.load(str(folder), device="cpu", int8_activations=int8_activations)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.inference_mode():
        expected = model(ids).logits.float()
        emulator.launched.clear()
        with cuda.using(emulator):
            monkeypatch.setattr(Linear4bit, "forward", lambda self, x: linear_4bit._cuda(x, *self._arguments()))
            of_8_bits = linear_int8._cuda if int8_activations else lambda x, *weight: linear_w8a16._cuda(x, *weight[:3])
            monkeypatch.setattr(Linear8bit, "forward", lambda self, x: of_8_bits(x, *self._arguments()))
            found = model(ids).logits.float()
    assert emulator.launched == kernels
    # Activations between layers are bfloat16: a difference in rounding reaches the next layer.
    assert (found - expected).norm() / expected.norm() < 0.01
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.8
