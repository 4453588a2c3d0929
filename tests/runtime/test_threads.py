"""How long torch's threads spin and how many there are: what is set, what is left alone, and who decides."""

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from qcli.runtime import threads
from tests.conftest import ROOT

OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def spins(code: str, **environment: str) -> str:
    """GOMP_SPINCOUNT as `code` leaves it."""
    clean = {name: value for name, value in os.environ.items() if name not in OURS}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport os\nprint(os.environ.get('GOMP_SPINCOUNT'))"],
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_verb_settles_the_wait_before_it_imports_torch():
    assert spins("import qcli") == "None"
    assert spins("import qcli\nqcli.QcliError") == threads.SPINS
    started = "import sys\nsys.argv = ['qcli', '--version']\nfrom qcli.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert spins(started).split()[-1] == threads.SPINS
    assert spins("import sys\nsys.modules['torch'] = None\nimport qcli\nqcli.QcliError") == "None"  # too late


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "77")])
def test_what_the_user_chose_stands(name, value):
    environment = {name: value}
    assert spins("import qcli\nqcli.QcliError", **environment) == environment.get("GOMP_SPINCOUNT", "None")


@pytest.mark.parametrize(
    "most, free, expected",
    [
        (2, 2.0, 2),
        (2, 1.7, 2),
        (2, 1.5, 1),
        (2, 1.0, 1),
        (2, 0.0, 1),
        (1, 1.0, 1),
        (1, 0.0, 1),
        (16, 16.0, 16),
        (16, 13.1, 13),
        (16, 2.0, 8),
        (5, 0.0, 3),
        (2, 64.0, 2),
    ],
)
def test_threads_are_the_free_cores_and_half_at_least(most, free, expected):
    assert threads.wanted(most, free) == expected


class Machine:
    """Four cores, of which `others` are used by others."""

    def __init__(self, monkeypatch, quota=4.0):
        self.others, self.started = 0.0, time.perf_counter()
        monkeypatch.setattr(threads, "INTERVAL", 0.01)
        monkeypatch.setattr(threads, "_work", self.work)
        monkeypatch.setattr(threads, "_allowed", lambda: 4)
        monkeypatch.setattr(threads, "cores", lambda: quota)
        self.total = 0.0

    def work(self):
        now = time.perf_counter()
        self.total, self.started = self.total + self.others * (now - self.started), now
        return self.total, 0.0

    def settles_at(self, expected):
        """Whether torch has so many threads after a while."""
        limit = time.perf_counter() + 10
        while torch.get_num_threads() != expected and time.perf_counter() < limit:
            time.sleep(0.001)
        return torch.get_num_threads() == expected


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_threads_follow_what_others_use(monkeypatch, four_threads):
    machine = Machine(monkeypatch)
    with threads.following({}):
        machine.others = 1.0
        assert machine.settles_at(3)
        machine.others = 3.9
        assert machine.settles_at(2)
        machine.others = 0.1
        assert machine.settles_at(4)
        machine.others = 3.9
        assert machine.settles_at(2)
    assert torch.get_num_threads() == 4


def test_a_quota_is_the_most(monkeypatch, four_threads):
    machine = Machine(monkeypatch, quota=2.0)
    with threads.following({}):
        assert machine.settles_at(2)


def test_a_number_that_somebody_else_set_is_left_alone_until_it_is_taken_back(monkeypatch, four_threads):
    machine = Machine(monkeypatch)
    with threads.following({}):
        machine.others = 2.0
        assert machine.settles_at(2)
        torch.set_num_threads(1)  # as `quantize` does, which has threads of its own
        machine.others = 0.0
        time.sleep(0.1)
        assert torch.get_num_threads() == 1
        torch.set_num_threads(2)
        assert machine.settles_at(4)
        torch.set_num_threads(1)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("environment", [{"OMP_NUM_THREADS": "3"}, {"MKL_NUM_THREADS": "3"}])
def test_a_number_in_the_environment_stands(monkeypatch, four_threads, environment):
    machine = Machine(monkeypatch)
    machine.others = 4.0
    with threads.following(environment):
        time.sleep(0.1)
        assert torch.get_num_threads() == 4


def test_nothing_is_followed_where_the_system_does_not_say_who_works(monkeypatch, four_threads):
    monkeypatch.setattr(threads, "_work", lambda: None)
    with threads.following({}):
        assert not any(thread.name == "qcli threads" for thread in threading.enumerate())


def test_quotas_of_both_kinds_of_control_groups(tmp_path):
    root, own = tmp_path / "cgroup", tmp_path / "own"
    (root / "a/b").mkdir(parents=True)
    (root / "cpu").mkdir()
    assert threads._quotas(root, own) == []
    own.write_text("12:cpu:/elsewhere\n0::/a/b\n")
    (root / "a/b/cpu.max").write_text("max 100000\n")
    assert threads._quotas(root, own) == []
    (root / "a/cpu.max").write_text("150000 100000\n")
    (root / "cpu.max").write_text("800000 100000\n")
    assert threads._quotas(root, own) == [1.5, 8.0]
    (root / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (root / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert threads._quotas(root, own) == [1.5, 8.0]
    (root / "cpu/cpu.cfs_quota_us").write_text("50000\n")
    assert threads._quotas(root, own) == [1.5, 8.0, 0.5]


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux says who works")
def test_the_work_of_all_holds_our_own():
    before = threads._work()
    limit = time.process_time() + 0.3
    while time.process_time() < limit:
        pass
    after = threads._work()
    tick = len(os.sched_getaffinity(0)) / os.sysconf("SC_CLK_TCK")
    assert after[1] - before[1] >= 0.3 and after[0] - before[0] >= after[1] - before[1] - 2 * tick
