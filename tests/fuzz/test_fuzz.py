"""A few hundred damaged folders of the campaign, always the same."""

import sys

import pytest

from tests.fuzz import campaign

CASES, GROUPS = 320, 8
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory and time with functions of Linux")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return campaign.make_models(tmp_path_factory.mktemp("intact"))


@pytest.mark.parametrize("first", range(GROUPS))
def test_every_damaged_folder_ends_in_words(first, models, tmp_path):
    faults = []
    for number in range(first, CASES, GROUPS):
        what, command, outcome = campaign.case(number, models, tmp_path)
        if outcome.fault:
            faults.append(f"case {number}: {what}\n{' '.join(command)}\n{outcome.fault}")
    assert not faults, "\n".join(faults)


def test_a_fault_is_seen(models, tmp_path, monkeypatch):
    """The campaign finds a verb that breaks, and one that writes other weights than it read."""
    from qcli.formats import describe
    from qcli.methods import _blockwise

    def broken(*arguments):
        raise TypeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(describe, "describe", broken)
        assert "planted" in campaign.runs.run(["info", str(models[0])]).fault
    quantize = _blockwise.quantize_4bit
    monkeypatch.setattr(_blockwise, "quantize_4bit", lambda x, *rest: quantize(-x, *rest))
    assert campaign.runs.run(["quantize", str(models[0]), "-o", str(tmp_path / "out")]).code == 0
    assert "is off by up to" in campaign.runs.wrong_bytes(tmp_path / "out", models[0])
