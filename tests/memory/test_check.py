"""What has no room is refused before its weights are read, with an option that fits."""

import pytest

import qcli
from qcli.checkpoint.source import open_source
from qcli.errors import DeviceError, PlanError
from qcli.loading.room import check_room
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model

DEMO = ROOT / "examples/demo-model"


@pytest.fixture(scope="module")
def source():
    return open_source(str(DEMO))


def needed(source, method, dtype="auto") -> int:
    """The least that is let through."""
    low, high = 0, 1 << 34
    while low < high:
        middle = (low + high) // 2
        try:
            check_room(source, method, dtype, middle, "memory")
            high = middle
        except DeviceError:
            low = middle + 1
    return low


def test_what_is_needed_is_weights_and_more(source, tmp_path):
    weights = {}
    for bits in (None, 8, 4):
        model, _ = qcli.load(str(DEMO), bits=bits, device="cpu")
        tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}.values()
        weights[bits] = sum(t.numel() * t.element_size() for t in tensors)
    found = {None: needed(source, None), 8: needed(source, "llm-int8"), 4: needed(source, "nf4")}
    for bits, size in found.items():
        assert weights[bits] * 0.99 < size < weights[bits] + 5_000_000, bits
    assert found[4] < found[8] < found[None] < needed(source, None, "float32")


def test_the_message_names_options_that_fit(source):
    eight, four = needed(source, "llm-int8"), needed(source, "nf4")
    with pytest.raises(DeviceError, match=r"needs \d\.\d+ MB of GPU memory at the least, and \d\.\d+ MB are free") as refused:
        check_room(source, None, "auto", eight, "GPU memory")
    assert refused.value.hint.startswith("Try --bits 8 or --bits 4 or --device-map auto;")
    with pytest.raises(DeviceError) as refused:
        check_room(source, "llm-int8", "auto", four, "memory")
    assert refused.value.hint.startswith("Try --bits 4;")
    with pytest.raises(DeviceError) as refused:
        check_room(source, "nf4", "auto", 1000, "memory")
    assert refused.value.hint == f"See what would fit: qcli estimate-memory {DEMO}"


def test_generate_refuses_before_it_reads(quick_cli, monkeypatch):
    monkeypatch.setattr("qcli.loading.load.available_memory", lambda: 2_000_000)
    done = quick_cli("generate", DEMO, "--bits", 8, "--device", "cpu", "Once")
    assert done.returncode == 1 and "2.00 MB are free" in done.stderr and not done.stdout
    monkeypatch.setattr("qcli.loading.load.available_memory", lambda: None)
    assert quick_cli("generate", DEMO, "--bits", 8, "--device", "cpu", "--max-new-tokens", 1, "Once").returncode == 0


def test_quantized_checkpoints_are_checked_as_they_are_stored(tmp_path, monkeypatch):
    qcli.quantize(str(DEMO), tmp_path / "four", bits=4)
    monkeypatch.setattr("qcli.loading.load.available_memory", lambda: 500_000)
    with pytest.raises(DeviceError, match="500 kB are free"):
        qcli.load(str(tmp_path / "four"), device="cpu")


def test_weights_in_a_mapped_file_are_not_counted(monkeypatch):
    monkeypatch.setattr("qcli.loading.load.available_memory", lambda: 1000)
    assert qcli.load(str(DEMO), device="cpu")[0] is not None


def test_a_model_that_the_estimate_does_not_know_is_let_through(tmp_path):
    make_model("opt", tmp_path)
    add_tokenizer(tmp_path)
    source = open_source(str(tmp_path))
    whole = dict(source.config)
    for config in ({"model_type": "never-heard-of"}, whole | {"num_hidden_layers": "x"}, whole | {"ffn_dim": [None]}):
        source.config = config
        check_room(source, "nf4", "auto", 10, "memory")


def test_quantize_plans_with_the_memory_there_is(tmp_path, monkeypatch):
    monkeypatch.setattr("qcli.quantization.room.available_memory", lambda: 1_000_000)
    with pytest.raises(PlanError, match=r"the run needs [\d.]+ MB of memory, and 1.00 MB are free"):
        qcli.quantize(str(DEMO), tmp_path / "out", bits=4)
    assert not (tmp_path / "out").exists()
