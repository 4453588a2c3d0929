import json

import pytest

from qcli import doctor
from qcli.runtime import cpu


def test_every_part_is_named(cli):
    done = cli("doctor", "--json")
    found = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert done.returncode == 0 and done.stderr == ""
    parts = ("qcli", "CPU", "CPU kernels", "threads", "memory", "torch", "transformers", "bitsandbytes", "NVIDIA GPU")
    assert {*parts, "nvcc", "PyCUDA"} <= found.keys()
    assert found["threads"]["value"] == "1" and "GB/s by 1 thread" in found["memory"]["value"]
    if cpu.variants():
        assert found["CPU kernels"]["value"].startswith(cpu.variants()[-1]) and found["CPU kernels"]["advice"] is None


def test_the_table_and_what_to_do_about_a_choice(cli):
    done = cli("doctor", env={"QCLI_CPU_ISA": "reference"})
    assert done.returncode == 0 and "CPU kernels" in done.stdout
    if cpu.variants():
        assert "off: QCLI_CPU_ISA=reference" in done.stdout and "CPU kernels: unset QCLI_CPU_ISA" in done.stdout


def test_a_library_that_is_not_there(cli, tmp_path):
    done = cli("doctor", env={"QCLI_CPU_LIBRARY": str(tmp_path / "none.so")})
    assert "plain torch serves" in done.stdout and "CPU kernels: unset QCLI_CPU_LIBRARY" in done.stdout


@pytest.mark.parametrize("there, advice", [(None, "apt install g++"), ("libqcli_cpu.so", "install qcli again")])
def test_without_a_compiler(there, advice, monkeypatch):
    monkeypatch.setattr(cpu, "problem", lambda: "not built")
    monkeypatch.setattr(cpu, "path", lambda: there)
    monkeypatch.delenv("QCLI_CPU_LIBRARY", raising=False)
    found = {entry.name: entry for entry in doctor._cpu()}["CPU kernels"]
    assert "plain torch serves" in found.value and advice in found.advice


def test_an_unknown_variant_is_a_sentence(cli):
    done = cli("doctor", env={"QCLI_CPU_ISA": "mmx"})
    assert done.returncode == 2 and "QCLI_CPU_ISA is 'mmx'" in done.stderr


@pytest.mark.parametrize("missing, advice", [("nvcc", "CUDA toolkit"), ("PyCUDA", "pip install 'qcli[cuda]'")])
def test_what_a_gpu_lacks_is_named_with_its_cure(missing, advice, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = {entry.name: entry for entry in doctor._cuda(["NVIDIA H100, 550.1, 81559 MiB"])}
    assert found["NVIDIA GPU"].value.startswith("NVIDIA H100") and advice in found[missing].advice
    assert {entry.name: entry for entry in doctor._cuda([])}[missing].advice is None
