"""`evaluate --cluster`: the figures of one machine's run."""

import pytest

import qcli
from qcli.errors import UsageError
from tests.conftest import ROOT

MODEL = str(ROOT / "examples" / "demo-model")
TEXT = {"tokens": 1500, "sequence_length": 128}


def same(ours, theirs):
    """Whether all figures of two results are the same: bit by bit, or sums of squares to rounding."""
    assert type(ours) is type(theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            same(a, b)
    elif isinstance(ours, float):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-12)
    else:
        assert ours == theirs


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_simulated_methods(ray_cluster, workers):
    options = TEXT | {"methods": "nf4,int8,llm-int8"}
    here = qcli.evaluate(MODEL, **options)
    there = qcli.evaluate(MODEL, **options, cluster=ray_cluster.address, workers=workers)
    same(there.summary(), here.summary())


@pytest.mark.slow
def test_calibrated_forms_and_two_models(ray_cluster, tmp_path):
    options = TEXT | {"methods": "nf4,nf4-calibrated"}
    same(qcli.evaluate(MODEL, **options, cluster=ray_cluster.address).summary(), qcli.evaluate(MODEL, **options).summary())
    qcli.quantize(MODEL, tmp_path / "nf4", bits=4)
    pair = TEXT | {"against": MODEL, "kv_dtype": "int8"}
    there = qcli.evaluate(str(tmp_path / "nf4"), **pair, cluster=ray_cluster.address)
    same(there.summary(), qcli.evaluate(str(tmp_path / "nf4"), **pair).summary())


def test_a_speed_is_that_of_one_machine():
    with pytest.raises(UsageError, match="--cluster and --speed"):
        qcli.evaluate(MODEL, speed=True, cluster="local")
