"""The one table of names: what each scheme takes, by arithmetic, and that every verb reads the same name the same way."""

import json
from dataclasses import replace

import pytest

from qcli import formats, methods, schemes
from qcli.checkpoint.dtypes import TensorSpec
from qcli.errors import UsageError
from qcli.formats import Weight
from qcli.memory.costs.weights import METHODS
from qcli.schemes import NAMED, QUANTIZED, Scheme
from tests.conftest import ROOT

DEMO = ROOT / "examples" / "demo-model"


@pytest.mark.parametrize(
    "name, bits",
    [
        ("unquantized", 16),
        ("int8-per-tensor", 8 + 32 / 2**24),
        ("int8", 8 + 16 / 4096),
        ("zeropoint", 8 + 64 / 4096),
        ("llm-int8", 8 + 32 / 4096),
        ("nf4-plain", 4 + 32 / 64),
        ("nf4", 4 + 8 / 64 + 32 / 64 / 256 + 32 / 2**24),
        ("nf3", 3 + 16 / 64),
        ("kmeans", 4 + 16 * 16 / 4096),
        ("squeezellm", 4 + 16 * 16 / 4096 + 20 * 48 / 4096),
        ("rtn", 4 + 16 / 128),
        ("hqq", 4 + 16 / 64 + 8 / 64),  # a zero point is a byte in memory
        ("fp8", 8 + 16 / 4096),
        ("mxfp4", 4 + 8 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / 2**24),
    ],
)
def test_bits_of_the_parts(name, bits):
    assert 8 * NAMED[name].stored_bytes(4096, 4096) / 4096**2 == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("width", [352, 392, 1568, 3136, 4096, 18944])
def test_the_share_of_some_columns_is_as_many_columns(width):
    for count in range(0, width // 2, 8):
        assert replace(NAMED["llm-int8"], outlier_share=count / width).outlier_columns(width) == count


def test_the_papers_form_keeps_columns_beside():
    kept = NAMED["llm-int8-paper"].stored_bytes(100, 200, "F16", outlier_columns=3)
    assert kept - NAMED["llm-int8"].stored_bytes(100, 200, "F16", outlier_columns=3) == 3 * 100 * 2


@pytest.mark.parametrize("share, scales", [("flat", 12), ("group", 21), ("row", 7), ("tensor", 1)])
def test_scales_of_a_weight_whose_size_nothing_divides(share, scales):
    """7 rows of 50, 32 to a scale: 350 elements in 11 blocks, two and a rest in each row."""
    assert Scheme("x", "x", 4, share, 32).scales(7, 50) == (11 if share == "flat" else 14 if share == "group" else scales)


def test_names_mean_one_thing_everywhere():
    """What quantize writes, what generate takes and what estimate-memory counts are rows of the same table."""
    of_bitsandbytes = {"llm-int8", "nf4", "nf4-plain", "fp4", "fp4-plain"}
    of_others = of_bitsandbytes | {"int8", "rtn", "hqq", "fp8", "mxfp4", "nvfp4", "smoothquant", "awq"}
    others = [each for each in formats.all_formats() if each.name != "qcli"]
    assert of_others == {name for name in QUANTIZED if any(each.refuses(NAMED[name]) is None for each in others)}
    assert set(formats.written()) == set(QUANTIZED) - {"llm-int8-paper"}
    assert set(METHODS) - {"bfloat16", "float16", "float32", "stored"} == set(NAMED) - {"unquantized"}
    for name, scheme in NAMED.items():
        method = methods.make(scheme)
        assert method.scheme == scheme, name
        assert type(method)(**vars(method)) == method


@pytest.mark.parametrize("name", ["llm-int8-paper", "unquantized"])
def test_what_no_format_holds_is_refused_with_the_reason(name, quick_cli, tmp_path):
    for command in (("quantize", DEMO, "--output", tmp_path / "out"), ("generate", DEMO, "Once")):
        done = quick_cli(*command, "--method", name)
        assert done.returncode == 2 and f"not {name}" in done.stderr and "qcli evaluate --methods" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_names_are_refused_alike(quick_cli):
    for command in (
        ("quantize", DEMO, "--method", "nf5"),
        ("generate", DEMO, "Once", "--method", "nf5"),
        ("evaluate", DEMO, "--methods", "nf5"),
        ("estimate-memory", DEMO, "--bits", "nf5"),
    ):
        done = quick_cli(*command)
        assert done.returncode == 2 and "there is no method 'nf5'; nearest: nf4" in done.stderr.replace("\n", " ")


def test_nf4_plain_is_nf4_without_double_quantization(quick_cli, tmp_path):
    for name, options in (("a", ("--method", "nf4-plain")), ("b", ("--method", "nf4", "--no-double-quant"))):
        assert quick_cli("quantize", DEMO, "--output", tmp_path / name, *options).returncode == 0
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"] is False


def test_formats_and_schemes_agree_on_sizes():
    """Beside the parts bitsandbytes stores its tables and JSON, and the scheme counts the offset that the JSON holds."""
    weight = Weight("m.weight", 96, 384, "BF16")
    for name in formats.written():
        stored, resident = formats.stored_tensors(NAMED[name], weight)
        parts = sum(spec.nbytes for spec in NAMED[name].parts(96, 384).values())
        tables = sum(spec.nbytes for spec in resident if spec.name.endswith("quant_map"))
        offset = 4 if NAMED[name].double_quant else 0
        if name in ("kmeans", "squeezellm"):  # entries of tables and values beside them are float32 in memory
            more = 2 * 96 * 16 + (2 * 96 * 2 + 4 * 97 if name == "squeezellm" else 0)  # 0.5% of 384 columns, and where rows begin
            assert sum(spec.nbytes for spec in resident) == parts + more and sum(spec.nbytes for spec in stored) == parts
            continue
        if NAMED[name].runs_by_table(384):  # in memory scales are float32, beside a table
            assert sum(spec.nbytes for spec in resident) == parts + 2 * NAMED[name].scales(96, 384) + 4 * 2 ** NAMED[name].bits
            assert sum(spec.nbytes for spec in stored) == parts
            continue
        assert sum(spec.nbytes for spec in resident) == parts + tables - offset, name
        assert {spec.name for spec in resident} <= {spec.name for spec in stored}
    assert TensorSpec("x", "F4", (3, 5)).nbytes == 7


@pytest.mark.parametrize("options", [{"block_size": 48}, {"block_size": "64"}, {"block_size": True}, {"groups": 3}])
def test_options_are_checked(options):
    with pytest.raises(UsageError):
        methods.make(schemes.named("nf4"), options)
