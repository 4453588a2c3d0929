"""What a process costs and what is left, against what the kernel says and against memory that is taken here."""

import os

import psutil
import pytest

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
