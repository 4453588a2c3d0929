"""What a process costs and what is left, against what the kernel says and against memory that is taken here."""

import os
from pathlib import Path

import psutil
import pytest

from qcli import process
from qcli.process import available_memory, peak_memory, resident_memory

MIB = 1 << 20


def test_memory_that_is_taken_and_given_back_shows():
    before = resident_memory()
    taken = bytearray(os.urandom(1) * (64 * MIB))
    during = resident_memory()
    assert before + 60 * MIB < during <= peak_memory() + MIB
    del taken
    assert resident_memory() < during - 60 * MIB


def test_what_is_available_is_less_than_the_machine_has():
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("error", [FileNotFoundError("/proc/meminfo"), psutil.AccessDenied()])
def test_a_system_that_does_not_report_is_no_error(monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(psutil.Process, "memory_info", refuse)
    assert available_memory() is None
    assert resident_memory() == peak_memory() > 0


@pytest.mark.parametrize(
    "controllers, limit, usage",
    [("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"), ("", "memory.max", "memory.current")],
)
def test_a_control_group_limits_what_is_available(controllers, limit, usage, tmp_path, monkeypatch):
    """The narrowest of the groups around the process counts, and pages of files that nobody uses are free."""
    line = Path("/proc/self/cgroup")
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, *a: f"4:{controllers}:/outer/inner\n" if p == line else read(p, *a))
    monkeypatch.setattr(process, "CGROUPS", tmp_path)
    root = tmp_path / "memory" if controllers else tmp_path
    for group, most in (("outer", "9000"), ("outer/inner", "max" if not controllers else str(2**63 - 4096))):
        (root / group).mkdir(parents=True)
        (root / group / limit).write_text(f"{most}\n")
        (root / group / usage).write_text("5000\n")
        (root / group / "memory.stat").write_text("active_file 700\ninactive_file 600\n")
    assert available_memory() == 4600
    (root / "outer" / usage).write_text("20000\n")
    assert available_memory() == 0
    (root / "outer" / limit).unlink()
    assert available_memory() > 9000
