"""`qcli methods`."""

import json

from qcli.formats import all_formats
from qcli.methods import option_types
from qcli.schemes import BY_TEXTS, NAMED, QUANTIZED


def test_the_table_has_every_method(quick_cli):
    done = quick_cli("methods", "--json")
    found = {each["name"]: each for each in json.loads(done.stdout)["methods"]}
    assert list(found) == list(QUANTIZED)
    for name, each in found.items():
        held = [format.name for format in all_formats() if format.refuses(NAMED[name]) is None]
        assert set(held) <= set(each["formats"]) and each["bits"] == NAMED[name].bits
        assert each["needs_calibration"] == (name in BY_TEXTS)
        if name not in BY_TEXTS:
            assert each["measured"]["demo"]["kl"] > 0, "run benchmarks/methods.py"
    assert found["rtn"]["formats"] == ["compressed-tensors", "gptq", "awq", "qcli"]
    assert found["fp8"]["activations"] == "E4M3" and found["nf4"]["activations"] == "16 bits"


def test_people_see_the_same(quick_cli):
    text = quick_cli("methods").stdout
    assert all(name in text for name in QUANTIZED) and "KL" in text


def test_one_method_shows_its_options(quick_cli):
    for name, scheme in NAMED.items():
        done = quick_cli("methods", name, "--json")
        (found,) = json.loads(done.stdout)["methods"]
        assert [option["name"] for option in found["options"]] == list(option_types(scheme)), name
    text = quick_cli("methods", "rtn").stdout
    assert "group_size" in text and "128" in text and "--set zero_point" in text
    done = quick_cli("methods", "nf5")
    assert done.returncode == 2 and "there is no method 'nf5'; nearest: nf4" in done.stderr
