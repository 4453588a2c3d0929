"""What a report recommends to leave, read back from its file."""

import json

import pytest

from qcli.errors import UsageError
from qcli.outliers.recommend import read_skip


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_modules_of_a_report_are_read(tmp_path):
    report = {"format": "qcli-outliers", "recommendation": {"skip": ["model.layers.1.mlp.down_proj"], "method": "nf4"}}
    assert read_skip(write(tmp_path / "report.json", report)) == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not valid JSON"),
        ([], "holds \\[\\] \\(a list\\), expected a JSON object"),
        ({}, "its format is None, expected 'qcli-outliers'"),
        ({"format": "qcli-weights"}, "its format is 'qcli-weights', expected 'qcli-outliers'"),
        ({"format": "qcli-outliers", "recommendation": None}, "holds no recommendation"),
        ({"format": "qcli-outliers", "recommendation": {}}, "has no list of modules to skip"),
        ({"format": "qcli-outliers", "recommendation": ["a"]}, "has no list of modules to skip"),
        ({"format": "qcli-outliers", "recommendation": {"skip": "down_proj"}}, "has no list of modules to skip"),
        ({"format": "qcli-outliers", "recommendation": {"skip": [1]}}, "has no list of modules to skip"),
    ],
)
def test_files_that_are_no_report(tmp_path, content, message):
    with pytest.raises(UsageError, match=message):
        read_skip(write(tmp_path / "report.json", content))
    with pytest.raises(UsageError, match="cannot read the report .*none.json"):
        read_skip(tmp_path / "none.json")
