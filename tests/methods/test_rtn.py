"""Round to nearest in compressed-tensors' format, against compressed_tensors itself, transformers and plain arithmetic."""

import json

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

import qcli
from qcli.errors import CheckpointError, PlanError, UsageError
from qcli.methods import make
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.packing import pack_words, to_signed, to_unsigned, unpack_words
from qcli.quantization.quantize import make_plan
from qcli.runtime import cpu
from qcli.schemes import NAMED
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model

DEMO = str(ROOT / "examples" / "demo-model")
OPTIONS = [
    {"group_size": 128},
    {"group_size": 32, "zero_point": True},
    {"bits": 8, "group_size": 64},
    {"bits": 8, "group_size": 64, "zero_point": True},
]


def arguments(options):
    """What compressed_tensors calls the same scheme."""
    bits, symmetric = options.get("bits", 4), not options.get("zero_point", False)
    return QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=options["group_size"])


def encoded(weight, options, rows=7):
    """All parts, fed in chunks of a few rows, the last first."""
    encoder = make(NAMED["rtn"], options).encoder(*weight.shape, weight.device)
    starts = range(0, len(weight), rows)
    codes = {
        start: encoder.feed(weight[start : start + rows].reshape(-1), start * weight.shape[1])["codes"] for start in starts[::-1]
    }
    parts, errors = encoder.finish()
    return parts | {"codes": torch.cat([codes[start] for start in starts])}, errors


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_codes_and_values_are_those_of_compressed_tensors(options, dtype):
    generator = torch.Generator().manual_seed(3)
    weight = (torch.randn(33, 384, generator=generator) * torch.linspace(0.01, 3, 33)[:, None]).to(dtype)
    weight[4] = 0.0
    weight[5] = weight[5].abs()
    weight[6, 7] = -50.0
    parts, errors = encoded(weight, options)
    args = arguments(options)
    groups = weight.float().unflatten(-1, (-1, options["group_size"]))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    busy = [row for row in range(33) if row != 4]  # a group of zeros has eps, which is that of the dtype
    assert torch.equal(parts["scale"][busy], scale.to(dtype)[busy])
    state = {"weight": weight, "weight_scale": parts["scale"]}
    if options.get("zero_point"):
        assert (parts["zero_point"][busy].int() - zero.int()[busy]).abs().max() <= 1  # theirs is of the unrounded scale
        state["weight_zero_point"] = parts["zero_point"]
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    if dtype == torch.float32:  # in 16 bits they divide in 16 bits, and so miss the nearest code now and then
        assert torch.equal(pack_words(to_unsigned(parts["codes"], args.num_bits), args.num_bits), theirs["weight_packed"])
    theirs["weight_packed"] = pack_words(to_unsigned(parts["codes"], args.num_bits), args.num_bits)
    ours = make(NAMED["rtn"], options).decode(parts, *weight.shape)
    values = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert values.dtype == dtype and torch.equal(ours, values.float())
    assert errors.squared_error == pytest.approx((weight.double() - values.double()).square().sum().item(), rel=1e-4)
    assert errors.squared_norm == pytest.approx(weight.double().square().sum().item(), rel=1e-5) and errors.nonfinite == 0
    step = parts["scale"].float().repeat_interleave(options["group_size"], 1)
    # Half a step; a step where the largest value meets the end of the codes; and the roundings of the dtype.
    assert ((ours - weight.float()).abs() <= step * 1.02 + weight.float().abs() * 2 * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 31, 64])
def test_words_are_those_of_compressed_tensors(bits, count):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, count), generator=torch.Generator().manual_seed(count)).to(
        torch.int8
    )
    words = pack_words(to_unsigned(codes, bits), bits)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(words, theirs)
    assert torch.equal(to_signed(unpack_words(theirs, bits, count), bits), codes)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(codes.shape)), codes)


def test_a_word_by_hand():
    assert pack_words(to_unsigned(torch.arange(-8, 0, dtype=torch.int8)[None], 4), 4).tolist() == [[0x76543210]]
    three = pack_words(torch.arange(32, dtype=torch.uint8)[None] % 8, 3)
    assert [word & 0xFFFFFFFF for word in three[0].tolist()] == [0x88FAC688, 0xC688FAC6, 0xFAC688FA]


def test_not_finite_values_are_counted_and_stay_in_their_group():
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    weight[2, 3], weight[3, 5] = torch.nan, torch.inf
    parts, errors = encoded(weight, {"group_size": 64})
    values = make(NAMED["rtn"], {"group_size": 64}).decode(parts, 4, 128)
    assert errors.nonfinite == 2
    assert torch.isfinite(values[:2]).all() and torch.isfinite(values[2:, 64:]).all()
    with pytest.raises(UsageError, match="group_size is 48"):
        make(NAMED["rtn"], {"group_size": 48})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("rtn")
    qcli.quantize(DEMO, root / "plain", bits=4, method="rtn", group_size=128, device="cpu")
    qcli.quantize(DEMO, root / "zero", method="rtn", group_size=32, settings={"zero_point": "true"}, device="cpu")
    return root


@pytest.mark.parametrize("name", ["plain", "zero"])
def test_the_folder_decodes_as_compressed_tensors_decodes_it(name, folders):
    state = load_file(folders / name / "model.safetensors")
    config = json.loads((folders / name / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**config["config_groups"]["group_0"]["weights"]))
    model, _ = qcli.load(str(folders / name), device="cpu")
    modules = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(modules) == 42
    for path, module in modules.items():
        stored = {key.removeprefix(f"{path}."): tensor for key, tensor in state.items() if key.startswith(f"{path}.")}
        assert ("weight_zero_point" in stored) == (name == "zero")
        theirs = PackedQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert torch.equal(module.dequantize(torch.bfloat16), theirs)


def assert_same_model(ours, theirs, ids):
    """The weights bit by bit. Logits, too, where the CPU multiplies bfloat16; where it does not, the products of qcli are made in
    float32, and those of torch are not."""
    with torch.no_grad():
        found, expected = ours(ids).logits, theirs(ids).logits
    for name, module in ours.named_modules():
        if isinstance(module, QuantizedLinear):
            assert torch.equal(module.dequantize(torch.bfloat16), theirs.get_submodule(name).weight), name
    if cpu.native_bfloat16() or cpu.variant() is None:
        assert torch.equal(found, expected)
    assert (found - expected).norm() <= 0.02 * expected.norm()


def test_transformers_loads_the_folder_and_gives_the_same_logits(folders):
    ids = torch.arange(5, 45)[None]
    ours, _ = qcli.load(str(folders / "plain"), device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders / "plain")
    assert_same_model(ours, theirs, ids)


def test_quantized_while_reading_is_the_same(folders):
    ids = torch.arange(5, 45)[None]
    for name, options in (("plain", {}), ("zero", {"group_size": 32, "settings": {"zero_point": "true"}})):
        stored, _ = qcli.load(str(folders / name), device="cpu")
        reading, _ = qcli.load(DEMO, method="rtn", device="cpu", **options)
        with torch.no_grad():
            assert torch.equal(stored(ids).logits, reading(ids).logits)


def test_every_verb_reads_it(folders, quick_cli):
    for command in (
        ("info", folders / "plain"),
        ("generate", folders / "plain", "Once", "--max-new-tokens", "4"),
        ("estimate-memory", folders / "plain", "--json"),
        ("evaluate", folders / "plain", "--text", ROOT / "examples/stories.jsonl", "--tokens", "200"),
        ("inspect-outliers", folders / "plain", "--text", ROOT / "examples/stories.jsonl", "--tokens", "200"),
    ):
        done = quick_cli(*command)
        assert done.returncode == 0, (command, done.stderr)
    said = quick_cli("info", folders / "plain").stdout
    assert "w4a16" in said and "1,369,728 parameters" in said


def test_groups_that_do_not_divide_a_row_are_a_problem_of_the_plan(tmp_path):
    make_model("llama", tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    plan = make_plan(str(tmp_path / "model"), tmp_path / "out", method="rtn", group_size=256)
    with pytest.raises(PlanError, match="groups of 256 do not divide rows of"):
        plan.check()
    with pytest.raises(UsageError, match="groups of 256 do not divide rows of") as refused:
        qcli.load(str(tmp_path / "model"), method="rtn", group_size=256, device="cpu")
    assert "proj" in refused.value.message


def damaged(folder, tmp_path, change):
    """A copy of a folder with its tensors or its quantization_config changed."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    state, config = load_file(copy / "model.safetensors"), json.loads((copy / "config.json").read_text())
    change(state, config["quantization_config"])
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


FIRST = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s, c: s.pop(f"{FIRST}.weight_scale"), "without what would decode them: model.layers.0.mlp.up_proj.weight_packed"),
        (lambda s, c: s.update({f"{FIRST}.weight_zero_point": torch.zeros(48, 1, dtype=torch.int32)}), "the config says symmetric"),
        (lambda s, c: s.update({f"{FIRST}.weight_packed": torch.zeros(384, 8, dtype=torch.int32)}), "expected I32 of"),
        (lambda s, c: c["config_groups"]["group_0"].update(targets=["re:.*down_proj"]), "no group of the config targets"),
        (lambda s, c: c["config_groups"]["group_0"]["weights"].update(num_bits=9), "num_bits is 9"),
        (lambda s, c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), "expected I32 of"),
        (lambda s, c: c["config_groups"]["group_0"]["weights"].update(group_size=64), "expected"),
        (lambda s, c: c.update(format="gguf"), "format is"),
        (lambda s, c: c["config_groups"]["group_0"].update(format="int-quantized"), "lacks model.layers.0."),
        (lambda s, c: c["config_groups"]["group_0"].update(targets=["re:("]), "is no regular expression"),
        (lambda s, c: c.update(config_groups=[1]), "config_groups is"),
        (lambda s, c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}), "has no strategy"),
        (
            lambda s, c: c["config_groups"]["group_0"].update(
                input_activations={"num_bits": 8, "strategy": "token", "dynamic": False}
            ),
            "rounds activations in a way",
        ),
    ],
)
def test_what_cannot_be_decoded_is_refused_in_words(change, words, folders, tmp_path):
    with pytest.raises(CheckpointError) as refused:
        qcli.load(damaged(folders / "plain", tmp_path, change), device="cpu")
    assert words in refused.value.message


def test_mixed_groups_in_one_folder(tmp_path):
    from qcli.recipe import recipe_of

    rules = [["*.down_proj", {"method": "rtn", "options": {"group_size": 64, "bits": 8}}]]
    recipe = recipe_of({"default": {"method": "rtn"}, "rules": rules}, "test")
    qcli.quantize(DEMO, tmp_path / "out", recipe=recipe, device="cpu")
    ours, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert [getattr(ours.model.layers[0].mlp, name).scheme.bits for name in ("down_proj", "up_proj")] == [8, 4]
    assert_same_model(ours, theirs, torch.arange(5, 45)[None])
