"""Running out of GPU memory ends in one sentence: what was needed, what was free, which option would fit."""

import pytest
import torch
import transformers

import qcli
from qcli.checkpoint.modules import find_linears
from qcli.checkpoint.source import open_source
from qcli.errors import CheckpointError, DeviceError, KernelError
from qcli.generation import graph as decode_graph
from qcli.generation.step import cache_argument
from qcli.loading import out_of_memory
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
    assert "Try --bits 4 (896 kB) or --device-map auto" in done.stderr.replace("\n", " ")


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
    assert "402 tokens need 1.23 MB for keys and values and about 12.29 kB for activations" in said
    assert "beside 2.74 MB of weights; GPU 0 had 600 kB of 8.00 GB free" in said
    assert "Try --max-new-tokens 189 or --bits 8 (saves 1.28 MB) or --bits 4 (saves 1.90 MB) or --device-map auto" in said


def test_the_tokens_it_proposes_fit(free):
    model, _ = qcli.load(str(DEMO), device="cpu")
    config = model.config
    error = out_of_memory.while_generating(model, 5, 400, {0: (600_000, 8 * 10**9)})
    proposed = int(error.hint.split("--max-new-tokens ")[1].split()[0])
    needed = out_of_memory.kv_bytes(config, 5 + proposed, 2) + out_of_memory.activation_bytes(model, 5)
    assert needed <= 600_000 < needed + 2 * out_of_memory.kv_bytes(config, 1, 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_keys_and_values_are_counted_right(name, tmp_path):
    model = make_model(name, tmp_path / "model")
    ids = torch.arange(1, 12)[None]
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, use_cache=True, **{cache_argument(model): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert out_of_memory.kv_bytes(model.config, 11, 2) == held


@pytest.mark.parametrize("method", [None, "nf4", "llm-int8"])
def test_weights_are_counted_right(method, tmp_path):
    make_model("llama", tmp_path / "model")
    source = open_source(str(tmp_path / "model"), None)
    counted = out_of_memory.weight_bytes(source, find_linears(source), method, "auto")
    model, _ = qcli.load(str(tmp_path / "model"), method=method, device="cpu")
    rope = sum(t.nbytes for n, t in model.named_buffers() if "inv_freq" in n)
    assert counted == sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - rope
