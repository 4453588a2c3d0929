"""What --gpu means: sizes, names however they are spelt, counts, and what nvidia-smi says."""

import os

import pytest

from qcli.errors import DeviceError, UsageError
from qcli.memory.placing.hardware import GIB, gpus, names


@pytest.mark.parametrize(
    "text, memory",
    [("24GB", 24 * 10**9), ("24GiB", 24 * GIB), (" 15.5 gb ", 15_500_000_000), ("512MiB", 512 << 20), ("1TB", 10**12)],
)
def test_sizes(text, memory):
    (gpu,) = gpus([text])
    assert gpu.memory == memory


@pytest.mark.parametrize(
    "text, name",
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("a100-80", "a100-80"),
        ("A100 80GB", "a100-80"),
        ("a100_80gb", "a100-80"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("h100", "h100"),
        ("H100 PCIe", "h100"),
        ("t4", "t4"),
        ("Tesla T4", "t4"),
        ("colab", "t4"),
        ("v100", "v100-16"),
        ("3090", "rtx3090"),
        ("NVIDIA H200", "h200"),
    ],
)
def test_names_however_spelt(text, name):
    (gpu,) = gpus([text])
    assert gpu.name == name


def test_a_card_has_less_than_its_name_says():
    for name, gib in (("rtx4090", 24), ("a100-80", 80), ("t4", 16), ("v100-16", 16), ("h100", 80), ("rtx5090", 32)):
        (gpu,) = gpus([name])
        assert 0.88 * gib * GIB < gpu.memory < gib * GIB
    assert all(gpus([name])[0].name == name for name in names())


def test_several_and_counts():
    assert [gpu.name for gpu in gpus(["2xt4", "24GB", "3 x 10GiB"])] == ["t4", "t4", "24GB", "10GiB", "10GiB", "10GiB"]
    assert gpus([]) == []


@pytest.mark.parametrize(
    "text, words",
    [
        ("rtx409", "rtx4090"),
        ("24", "neither a size nor a name"),
        ("24XB", "neither"),
        ("0GB", "more than 0 bytes"),
        ("0xt4", "counts no GPU"),
        ("", "neither"),
        ("-5GB", "neither"),
        ("24 G", "neither"),
    ],
)
def test_what_is_refused(text, words):
    with pytest.raises(UsageError) as error:
        gpus([text])
    assert words in error.value.message


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in for nvidia-smi that prints what it is told and keeps its arguments."""

    def make(text: str, code: int = 0):
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/asked\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return tmp_path / "asked"

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return make


def test_auto_asks_for_what_is_free(nvidia_smi, monkeypatch):
    asked = nvidia_smi("NVIDIA GeForce RTX 4090, 24564, 24000\nNVIDIA A100-SXM4-80GB, 81920, 1000")
    first, second = gpus(["auto"])
    assert first.memory == 24000 << 20 and "RTX 4090 has 25.17 GB free of 25.76 GB" in first.said
    assert second.memory == 1000 << 20
    assert "--id" not in asked.read_text()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    gpus(["auto"])
    assert "--id=1" in asked.read_text()


@pytest.mark.parametrize(
    "text, code", [("No devices were found", 6), ("", 0), ("NVIDIA-SMI has failed", 9), ("GPU, [N/A], [N/A]", 0)]
)
def test_auto_without_a_gpu_says_so(nvidia_smi, text, code):
    nvidia_smi(text, code)
    with pytest.raises(DeviceError, match="--gpu auto"):
        gpus(["auto"])


def test_auto_with_every_gpu_hidden(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA GeForce RTX 4090, 24564, 24000")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceError, match="hides every GPU"):
        gpus(["auto"])


def test_auto_without_a_driver(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DeviceError, match="no nvidia-smi"):
        gpus(["auto"])
