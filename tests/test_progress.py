"""Optional progress, and imports without garbage collection."""

import gc
import sys
from contextlib import contextmanager

import pytest

from qcli.process import importing
from qcli.progress import shown


def test_progress_is_shown_where_asked_for():
    seen = []

    class Bar:
        def advance(self, count, name):
            seen.append((count, name))

    @contextmanager
    def progress(total, done):
        seen.append((total, done))
        yield Bar()
        seen.append("closed")

    with shown(progress, 10, 3) as advance:
        advance(7, "a tensor")
    assert seen == [(10, 3), (7, "a tensor"), "closed"]
    with shown(None, 10) as advance:
        assert advance(7, "a tensor") is None


def test_garbage_is_collected_again_after_the_imports(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    with pytest.raises(ImportError), importing():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and frozen


def test_a_loaded_torch_leaves_the_collector_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", sys)
    with importing():
        assert gc.isenabled()
