"""Running out of GPU memory ends in one sentence: what was needed, what was free, which option would fit."""

import pytest
import torch
import transformers

import qcli
from qcli.checkpoint.source import open_source
from qcli.errors import CheckpointError, DeviceError, KernelError
from qcli.generation import graph as decode_graph
from qcli.loading import out_of_memory, room
from qcli.memory.costs.activations import activations
from qcli.memory.model.config import ModelConfig
from tests.conftest import ROOT
from tests.models import make_model

DEMO = ROOT / "examples" / "demo-model"
OUT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def free(monkeypatch):
    """A GPU with so much free of 8 GB."""

    def set_to(count):
        monkeypatch.setattr(out_of_memory, "free_memory", lambda gpus: {0: (count, 8 * 10**9)})

    return set_to


def fail(*arguments, **options):
    raise OUT


@pytest.mark.parametrize(
    "error",
    [
        OUT,
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
        KernelError("cannot load a kernel: cuModuleLoadDataEx failed: out of memory"),
    ],
)
def test_while_loading(error, free, monkeypatch, quick_cli):
    free(1_000_000)

    def load(*arguments, **options):
        raise error

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", load)
    done = quick_cli("generate", DEMO, "Once")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "need 2.74 MB; GPU 0 had 1.00 MB of 8.00 GB free" in done.stderr.replace("\n", " ")
    assert "Try --bits 4 (889 kB) or --device-map auto" in done.stderr.replace("\n", " ")


def test_while_quantizing(free, monkeypatch):
    """transformers notes down the exceptions of a conversion and reads on; this one gets through."""
    free(500_000)
    monkeypatch.setattr("qcli.methods._blockwise.quantize_4bit", fail)
    with pytest.raises(DeviceError) as stopped:
        qcli.load(str(DEMO), bits=4, device="cpu")
    assert "the weights of" in stopped.value.message and "GPU 0 had 500 kB" in stopped.value.message
    assert "--bits" not in stopped.value.hint and "--device-map auto" in stopped.value.hint


def test_while_loading_a_split_model(free, monkeypatch):
    free(500_000)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fail)
    with pytest.raises(DeviceError) as stopped:
        qcli.load(str(DEMO), device_map="auto", max_memory="cpu=1GB")
    assert stopped.value.hint == "Try a --max-memory that leaves more room on each GPU."


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    def load(*arguments, **options):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", load)
    with pytest.raises(CheckpointError, match="transformers cannot load it: shapes differ"):
        qcli.load(str(DEMO), device="cpu")


@pytest.mark.parametrize("captured", [False, True])
def test_while_generating(captured, free, monkeypatch, quick_cli):
    free(600_000)
    if captured:
        monkeypatch.setattr(decode_graph, "capture_for", lambda model: fail)
    else:
        monkeypatch.setattr(transformers.GenerationMixin, "generate", fail)
    done = quick_cli("generate", DEMO, "Once", "--max-new-tokens", "400")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr.replace("\n", " ")
    assert "402 tokens need 1.23 MB for keys and values and about 7.30 kB for activations" in said
    assert "beside 2.74 MB of weights; GPU 0 had 600 kB of 8.00 GB free" in said
    assert "Try --max-new-tokens 190 or --bits 8 (saves 1.24 MB) or --bits 4 (saves 1.85 MB) or --device-map auto" in said


def test_the_tokens_it_proposes_fit(free):
    """By the caches that transformers keeps: two tensors of heads x tokens x head_dim in each layer."""
    model, _ = qcli.load(str(DEMO), device="cpu")
    config = model.config
    error = out_of_memory.while_generating(model, 5, 400, {0: (600_000, 8 * 10**9)})
    proposed = int(error.hint.split("--max-new-tokens ")[1].split()[0])
    working = activations(ModelConfig(config.to_dict(), "demo"), 5, context=405, dtype="bfloat16").prefill
    per_token = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert 0 <= 600_000 - working - per_token * (5 + proposed) < per_token


@pytest.mark.parametrize("method", [None, "nf4", "llm-int8"])
def test_weights_are_counted_right(method, tmp_path):
    make_model("llama", tmp_path / "model")
    source = open_source(str(tmp_path / "model"), None)
    counted = room.weight_bytes(source, method, "auto")
    model, _ = qcli.load(str(tmp_path / "model"), method=method, device="cpu")
    # Not counted: tables that the model computes. Counted, though only bitsandbytes holds them: its tables, of 16 and 256 entries.
    beside = sum(t.nbytes for n, t in model.named_buffers() if n.endswith("inv_freq"))
    quantized = sum(getattr(module, "nested_offset", None) is not None for module in model.modules())
    offsets, tables = 4 * quantized, 4 * (16 + 256) * quantized
    assert counted == sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - beside + offsets + tables
