"""qcli's own format: every scheme and mixture, decoded by docs/formats.md alone; what it writes of old; damaged files."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import qcli
from qcli.checkpoint.source import open_source
from qcli.errors import CheckpointError, PlanError
from qcli.formats.describe import describe
from qcli.methods import make
from qcli.methods.simulate import simulate
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.quantization.quantize import make_plan
from qcli.recipe import recipe_of
from qcli.schemes import NAMED
from tests.conftest import ROOT
from tests.models import ARCHITECTURES, example_inputs, make_model, make_tied

DEMO = str(ROOT / "examples" / "demo-model")
# Method and options: every scheme that is not of bitsandbytes' kind, groups that do not divide rows of 64 among them.
FORMS = {
    **{name: (name, {}) for name in ("int8", "int8-per-tensor", "int8-row-wise", "zeropoint", "zeropoint-per-tensor")},
    **{f"rtn {bits}": ("rtn", {"bits": bits, "group_size": 32}) for bits in (2, 3, 4, 8)},
    **{f"rtn {bits} rows": ("rtn", {"bits": bits, "group_size": -1}) for bits in (2, 3, 4, 8)},
    **{f"rtn {bits} wide": ("rtn", {"bits": bits, "group_size": 128}) for bits in (2, 3, 4, 8)},
    **{f"rtn {bits} zero": ("rtn", {"bits": bits, "group_size": 64, "zero_point": True}) for bits in (2, 3, 4)},
    "rtn 3 search": ("rtn", {"bits": 3, "group_size": 32, "search": "mse"}),
    "nf3": ("nf3", {}),
    "nf3 search": ("nf3", {"group_size": 32, "search": "mse"}),
    "nf3 wide": ("nf3", {"group_size": 256}),
    **{f"kmeans {bits}": ("kmeans", {"bits": bits}) for bits in (2, 3, 4)},
    "kmeans sparse": ("kmeans", {"bits": 3, "sparse": 0.05}),
    "kmeans in 32 bits": ("kmeans", {"entries": "float32", "sparse": 0.02, "iterations": 3}),
    "hqq": ("hqq", {}),
    "hqq 3 wide": ("hqq", {"bits": 3, "group_size": 128}),
    "fp8": ("fp8", {}),
    "fp8 blocks": ("fp8", {"share": "block"}),
    "fp8 whole": ("fp8", {"share": "tensor", "activations": False}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {"activations": True}),
}
SHARE_ABSMAX = ("nvfp4", "fp8 whole")  # q, k and v share the absmax of a whole weight


def written(form, source, out, **options):
    method, settings = FORMS[form]
    text = {name: str(value).lower() for name, value in settings.items()}
    qcli.quantize(str(source), out, method=method, settings=text | options, format="qcli", device="cpu")
    return out


def modules_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def columns_of(packed, bits, columns):
    """Codes [rows, columns] of planes of 64 columns, byte by byte, without any code of qcli."""
    units = packed.reshape(len(packed), -1, 8 * bits)
    found = np.zeros((len(packed), units.shape[1], 64), np.uint8)
    for column in range(64):
        if bits == 4:
            found[..., column] = units[..., column % 32] >> (4 if column >= 32 else 0) & 15
        else:
            found[..., column] = units[..., column % 16] >> 2 * (column // 16) & 3
        if bits == 3:
            found[..., column] |= (units[..., 16 + column // 8] >> column % 8 & 1) << 2
    return found.reshape(len(packed), -1)[:, :columns]


def by_definition(name, state, config):
    """The weight float64 [out_features, in_features] of stored tensors, by docs/formats.md."""
    (entry,) = [each for each in config["schemes"] if name in each["weights"]]
    rows, columns = entry["weights"][name]
    bits, book, size = entry["bits"], entry.get("codebook"), entry.get("size", 1)
    if bits == 8:
        codes = state[name].float().numpy().reshape(rows, columns).astype(np.float64)
    else:
        codes = columns_of(state[name].numpy().reshape(rows, -1), bits, columns)
        if book == "table":
            pass
        elif book == "e2m1":
            codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes & 8, -1, 1)
        elif book == "nf3":
            codes = np.array([-1, -0.53502274, -0.24693143, 0, 0.18333748, 0.38199395, 0.62298572, 1])[codes]
        else:
            codes = codes.astype(np.float64) - 2 ** (bits - 1)
    if book == "table":
        values = np.take_along_axis(state[f"{name}.table"].double().numpy(), codes.astype(int), 1)
        if f"{name}.sparse_values" in state:
            columns = state[f"{name}.sparse_columns"].numpy()
            np.put_along_axis(values, columns, state[f"{name}.sparse_values"].double().numpy(), 1)
            assert columns.shape == (rows, max(1, round(entry["sparse"] * entry["weights"][name][1])))
        return torch.from_numpy(values)
    scale, share = state[f"{name}.scale"].double(), entry["share"]
    if entry.get("scale") == "e8m0":
        scale = torch.exp2(scale - 127)
    if f"{name}.global_scale" in state:
        scale = scale / state[f"{name}.global_scale"].double()
    wide = {"group": (1, size), "block": (size, size), "row": (1, columns), "tensor": (rows, columns)}[share]
    spread = lambda t: np.kron(t.numpy(), np.ones(wide))[:rows, :columns]  # noqa: E731
    if f"{name}.zero_point" in state:
        codes = codes - spread(state[f"{name}.zero_point"].double())
    return torch.from_numpy(codes * spread(scale))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A llama whose head is tied, and a qwen2 with biases."""
    root = tmp_path_factory.mktemp("sources")
    make_model("qwen2", root / "qwen2")
    make_tied("llama", root / "tied")
    return root


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_holds_what_the_method_makes_and_what_the_page_says(form, sources, tmp_path):
    out = written(form, sources / "qwen2", tmp_path / "out", max_shard_size="40KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    state = {name: tensor for path in out.glob("*.safetensors") for name, tensor in load_file(path).items()}
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    original = load_file(sources / "qwen2/model.safetensors")
    ours, _ = qcli.load(str(out), device="cpu")
    method, options = FORMS[form]
    modules = modules_of(ours)
    assert len(modules) == 14
    for path, module in modules.items():
        name = f"{path}.weight"
        found = module.dequantize(torch.float32 if form not in ("zeropoint", "zeropoint-per-tensor") else torch.bfloat16)
        exact = by_definition(name, state, config)
        assert (found.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max(), path
        assert found.dtype != torch.float32 or (found.double() - exact).abs().max() <= 2.0**-20 * exact.abs().max(), path
        if form not in SHARE_ABSMAX or path.endswith(("down_proj", "o_proj")):
            expected = simulate(make(NAMED[method], options), original[name]).weight
            assert torch.equal(module.dequantize(torch.bfloat16), expected.bfloat16()), path
    if form in SHARE_ABSMAX:
        return
    settings = {key: str(value).lower() for key, value in options.items()}
    if "wide" in form and method != "nf3":  # while it is read the widest-read format is taken, whose groups divide rows
        return
    reading, _ = qcli.load(str(sources / "qwen2"), method=method, settings=settings, device="cpu")
    for path, module in modules_of(reading).items():
        assert torch.equal(module.dequantize(torch.bfloat16), modules[path].dequantize(torch.bfloat16)), path


@pytest.mark.parametrize("form", FORMS)
def test_modules_multiply_the_weights_that_they_decode_to(form, sources, tmp_path):
    """Few tokens and many, with a bias, against a product in float64."""
    out = written(form, sources / "qwen2", tmp_path / "out")
    ours, _ = qcli.load(str(out), device="cpu")
    module = ours.model.layers[1].self_attn.q_proj
    module.rounds_activations = False
    assert module.bias is not None
    for tokens in (1, 3, 40):
        x = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        exact = x.double() @ module.dequantize(torch.float32).double().t() + module.bias.double()
        assert (module(x).double() - exact).abs().max() <= 0.02 * exact.abs().max()


MIXTURES = {
    "integers beside nf4": {
        "default": {"method": "rtn", "options": {"bits": 3, "group_size": 64}},
        "rules": [
            ["*.v_proj", {"method": "nf4"}],
            ["*.down_proj", {"method": "int8"}],
            ["*.o_proj", {"method": "keep"}],
            ["*.0.mlp", {"method": "rtn", "options": {"bits": 2, "group_size": 32, "zero_point": True}}],
        ],
    },
    "two thresholds": {
        "default": {"method": "llm-int8"},
        "rules": [["*.mlp", {"method": "llm-int8", "options": {"threshold": 2.5}}], ["*.v_proj", {"method": "fp8"}]],
    },
    "a head": {"default": {"method": "nf4"}, "head": {"method": "rtn", "options": {"bits": 3, "group_size": 64}}},
    "tables": {
        "default": {"method": "kmeans", "options": {"bits": 3, "sparse": 0.05}},
        "rules": [["*.mlp", {"method": "nf3"}], ["*.o_proj", {"method": "kmeans"}]],
        "head": {"method": "kmeans", "options": {"sparse": 0.02}},
    },
    "a head in 4 bits": {"default": {"method": "hqq"}, "head": {"method": "mxfp4"}},
    "a head in 8 bits": {"default": {"method": "rtn"}, "head": {"method": "int8"}, "format": "qcli"},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, sources, tmp_path):
    """Any of them, the head that is tied to the embedding too; loaded, and quantized while it is read."""
    recipe = recipe_of(MIXTURES[name], "it")
    out, source = tmp_path / "out", str(sources / "tied")
    assert make_plan(source, out, recipe=recipe).format.name == "qcli"
    qcli.quantize(source, out, recipe=recipe, device="cpu")
    ours, _ = qcli.load(str(out), device="cpu")
    read, _ = qcli.load(source, recipe=recipe, device="cpu")
    others = modules_of(read)
    for path, module in modules_of(ours).items():
        assert module.scheme == others[path].scheme
        assert torch.equal(module.dequantize(torch.bfloat16), others[path].dequantize(torch.bfloat16)), path
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, read(ids).logits)
    if "head" in MIXTURES[name]:
        embedding, head = ours.get_input_embeddings(), ours.lm_head
        assert torch.equal(embedding(ids)[0], head.dequantize(torch.bfloat16)[ids[0]])
        held = {
            t.data_ptr(): t.nbytes
            for m in (embedding, head)
            for t in (*m._parameters.values(), *m._buffers.values())
            if t is not None
        }
        codes = head.out_features * head.in_features * head.scheme.bits // 8
        assert codes <= sum(held.values()) < 1.6 * codes + 68 * 256, "the weight is held once"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("form", ["rtn 3 wide", "rtn 4 zero", "zeropoint", "nf3", "kmeans sparse"])
def test_architectures(form, name, tmp_path):
    """The same modules, and the logits of the weights that they decode to."""
    model_class, _, linears = ARCHITECTURES[name]
    original = make_model(name, tmp_path / "model", torch.float32)
    inputs = example_inputs(original)
    ours, _ = qcli.load(str(written(form, tmp_path / "model", tmp_path / "out")), device="cpu")
    modules = modules_of(ours)
    assert len(modules) == linears
    plain = model_class.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for path, module in modules.items():
        module.rounds_activations = False
        weight = module.dequantize(torch.float32)
        target = plain.get_submodule(path)
        target.weight.data = weight.t().contiguous() if type(target).__name__ == "Conv1D" else weight
    with torch.no_grad():
        a, b = ours(**inputs).logits, plain(**inputs).logits
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * float(b.abs().max()))


# What the format could hold before it held every scheme, and the bytes of then.
OLDER = {
    "mixed": (
        {
            "default": {"method": "nf4"},
            "rules": [
                ["*.down_proj", {"method": "llm-int8"}],
                ["*.o_proj", {"method": "fp4-plain", "options": {"block_size": 32}}],
            ],
            "format": "qcli",
        },
        "53c32586a3daf075ea189a3eb36ee475e9a75c9a57309dbb5abe1767a687a5ac",
        "6dd4cb95a4f25100b5263036ef709ebdb66dae8a58127035418b66e4b42866b1",
    ),
    "head": (
        {"default": {"method": "nf4"}, "head": {"method": "llm-int8"}},
        "6e6146b6ddd6c10ae42285ef38e4add43e6df18749636fbb6d100b3ebfe72810",
        "6dd4cb95a4f25100b5263036ef709ebdb66dae8a58127035418b66e4b42866b1",
    ),
    "8 bits": (
        {"default": {"method": "llm-int8", "options": {"threshold": 5}}, "format": "qcli"},
        "a213640203ead2c941a495bab2d66eff6e8bf183ce5dedd0d69aecd99a5fadbb",
        "f1f0c8e5e03bc857152f67828260919a52a163df6e654c33b7318f71bbec6fd5",
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_bytes_of_the_older_format(name, tmp_path):
    recipe, weights, config = OLDER[name]
    qcli.quantize(DEMO, tmp_path / "out", recipe=recipe_of(recipe, "it"), device="cpu")
    found = [hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest() for file in ("model.safetensors", "config.json")]
    assert found == [weights, config]


def test_it_is_taken_only_where_no_other_format_holds_the_recipe(sources, tmp_path):
    for recipe, expected in (
        (
            {"default": {"method": "rtn", "options": {"group_size": 64}}, "rules": [["*.mlp", {"method": "fp8"}]]},
            "compressed-tensors",
        ),
        ({"default": {"method": "nf4"}, "rules": [["*.mlp", {"method": "fp4"}]]}, "bitsandbytes"),
        ({"default": {"method": "nf4"}, "rules": [["*.mlp", {"method": "llm-int8"}]]}, "qcli"),
        ({"default": {"method": "nf4"}, "rules": [["*.mlp", {"method": "rtn", "options": {"group_size": 64}}]]}, "qcli"),
        ({"default": {"method": "zeropoint"}}, "qcli"),
    ):
        plan = make_plan(str(sources / "qwen2"), tmp_path / "out", recipe=recipe_of(recipe, "it"))
        assert plan.format.name == expected and not plan.problems
        assert ("qcli alone reads the result" in plan.notes) == (expected == "qcli")
    with pytest.raises(PlanError, match="groups of 128 do not divide rows of 64"):
        make_plan(str(sources / "qwen2"), tmp_path / "out", method="rtn").check()
    assert not make_plan(str(sources / "qwen2"), tmp_path / "out", method="rtn", format="qcli").problems


# Damage

OUT = "model.layers.0.self_attn.o_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    recipe = MIXTURES["integers beside nf4"] | {
        "rules": [
            ["*.v_proj", {"method": "nf4"}],
            ["*.down_proj", {"method": "nvfp4"}],
            ["*.o_proj", {"method": "kmeans", "options": {"bits": 3, "sparse": 0.05}}],
        ]
    }
    out = tmp_path_factory.mktemp("whole") / "out"
    qcli.quantize(str(sources / "qwen2"), out, recipe=recipe_of(recipe, "it"), device="cpu")
    return out


def changed(whole, to, config=None, tensors=None):
    shutil.copytree(whole, to)
    if config:
        value = json.loads((to / "config.json").read_text())
        config(value["quantization_config"])
        (to / "config.json").write_text(json.dumps(value))
    if tensors:
        state = load_file(to / "model.safetensors")
        tensors(state)
        save_file(state, to / "model.safetensors", {"format": "pt"})
    return to


def entry(config, name=UP):
    return next(each for each in config["schemes"] if name in each["weights"])


CONFIGS = {
    "no list": (lambda c: c.update(schemes={}), "schemes is no list"),
    "no object": (lambda c: c["schemes"].append(3), "is no object"),
    "no name": (lambda c: entry(c).pop("name"), "has no name"),
    "an unknown name": (lambda c: entry(c).update(name="rtn9"), "name is"),
    "bits": (lambda c: entry(c).update(bits=5), "bits is 5"),
    "other bits": (lambda c: entry(c).update(bits=2), f"{UP} is U8 of shape"),
    "flat": (lambda c: entry(c).update(share="flat"), "share is"),
    "a size of nothing": (lambda c: entry(c).update(size=0), "size is 0"),
    "another size": (lambda c: entry(c).update(size=32), f"{UP}.scale is BF16 of shape"),
    "a group without a size": (lambda c: entry(c).pop("size"), "a size of 0"),
    "a field of tomorrow": (lambda c: entry(c).update(rotation=1), "has a field 'rotation'"),
    "zero points": (lambda c: entry(c).update(zero_point=True), f"{UP} lacks {UP}.zero_point"),
    "E2M1 in 3 bits": (lambda c: entry(c).update(codebook="e2m1"), "codes of e2m1 in 3 bits"),
    "another scale": (lambda c: entry(c).update(scale="e8m0"), "scales in e8m0 for codes of integers"),
    "activations": (lambda c: entry(c).update(activations="all"), "activations is"),
    "another shape": (lambda c: entry(c)["weights"].update({UP: [64, 128]}), "the model expects [128, 64]"),
    "a shape of three": (lambda c: entry(c)["weights"].update({UP: [1, 2, 3]}), "weights is"),
    "listed twice": (lambda c: c["schemes"].append(entry(c)), "lists model.layers.0.mlp.gate_proj.weight twice"),
    "not listed": (lambda c: entry(c)["weights"].pop(UP), "1 stored as U8 without what would decode them"),
    "no weight": (lambda c: entry(c)["weights"].update({"x.weight": [1, 1]}), "x.weight, which is no weight"),
    "a table of groups": (lambda c: entry(c, OUT).update(share="group", size=64), "tables for each group"),
    "a table in bfloat16": (lambda c: entry(c, OUT).update(scale="model"), "tables for each row in model"),
    "a table of 4 bits": (lambda c: entry(c, OUT).update(bits=4), f"{OUT} is U8 of shape"),
    "a wrong share": (lambda c: entry(c, OUT).update(sparse=0.06), f"{OUT}.sparse_values is BF16 of shape [64, 3]"),
    "no share": (lambda c: entry(c, OUT).pop("sparse"), f"{OUT}.sparse_columns is stored, and kmeans has none"),
    "a share below 0": (lambda c: entry(c, OUT).update(sparse=-0.1), "sparse is -0.1"),
    "a share of integers": (lambda c: entry(c).update(sparse=0.1), "without a table"),
    "no schemes": (lambda c: c.pop("schemes"), "12 stored as U8 without what would decode them"),
}
TENSORS = {
    "shorter codes": (lambda s: s.update({UP: s[UP][:-24].contiguous()}), f"{UP} is U8 of shape"),
    "a row of codes": (lambda s: s.update({UP: s[UP].view(128, -1).contiguous()}), f"{UP} is U8 of shape"),
    "signed codes": (lambda s: s.update({UP: s[UP].view(torch.int8)}), f"{UP} is I8"),
    "no scale": (lambda s: s.pop(f"{UP}.scale"), "1 stored as U8 without what would decode them"),
    "scales in 64 bits": (lambda s: s.update({f"{UP}.scale": s[f"{UP}.scale"].double()}), f"{UP}.scale is F64"),
    "scales of rows": (lambda s: s.update({f"{UP}.scale": s[f"{UP}.scale"].view(-1)}), f"{UP}.scale is BF16 of shape [128]"),
    "a stray": (lambda s: s.update({f"{UP}.zero_point": torch.zeros(128, 1, dtype=torch.int8)}), "and rtn has none by the config"),
    "no table": (lambda s: s.pop(f"{OUT}.table"), f"{OUT} lacks {OUT}.table"),
    "a table in 64 bits": (lambda s: s.update({f"{OUT}.table": s[f"{OUT}.table"].double()}), f"{OUT}.table is F64"),
    "a short table": (
        lambda s: s.update({f"{OUT}.table": s[f"{OUT}.table"][:, :7].contiguous()}),
        f"{OUT}.table is F16 of shape [64, 7]",
    ),
    "no columns": (lambda s: s.pop(f"{OUT}.sparse_columns"), f"{OUT} lacks {OUT}.sparse_columns"),
    "columns in 64 bits": (lambda s: s.update({f"{OUT}.sparse_columns": s[f"{OUT}.sparse_columns"].long()}), "is I64"),
    "a column too far": (lambda s: s[f"{OUT}.sparse_columns"].__setitem__((5, -1), 64), "expected 0 to 63"),
    "a column below 0": (lambda s: s[f"{OUT}.sparse_columns"].__setitem__((5, 0), -1), "columns from -1 to"),
    "a column twice": (
        lambda s: s[f"{OUT}.sparse_columns"].__setitem__((5, 1), s[f"{OUT}.sparse_columns"][5, 0]),
        "the columns of row 5 do not ascend",
    ),
    "no codes": (lambda s: s.pop(UP), "missing"),
}


@pytest.mark.parametrize("damage", CONFIGS)
def test_damaged_configs_are_refused(damage, whole, tmp_path):
    edit, words = CONFIGS[damage]
    folder = changed(whole, tmp_path / "out", config=edit)
    with pytest.raises(CheckpointError) as e:
        qcli.load(str(folder), device="cpu")
    assert words in e.value.message, e.value.message
    assert describe(open_source(str(folder))).parameters > 0  # `info` shows what there is


@pytest.mark.parametrize("damage", TENSORS)
def test_damaged_tensors_are_refused(damage, whole, tmp_path):
    edit, words = TENSORS[damage]
    with pytest.raises(CheckpointError) as e:
        qcli.load(str(changed(whole, tmp_path / "out", tensors=edit)), device="cpu")
    assert words in e.value.message, e.value.message
