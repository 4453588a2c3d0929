"""What is written in each format: to the bit what its definition says, what compressed-tensors decodes, and what qcli itself
runs."""

import json

import numpy as np
import pytest
import torch
import transformers
from compressed_tensors.quantization import disable_quantization
from safetensors.torch import load_file
from transformers import CompressedTensorsConfig

import qcli
from qcli.errors import PlanError, UsageError
from qcli.formats import Weight, get
from qcli.methods import make
from qcli.methods.simulate import simulate
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.ops.round_floats import e2m1_codes, mx_scales
from qcli.packing import pack_pairs
from qcli.quantization.quantize import make_plan
from qcli.schemes import NAMED
from tests.models import ARCHITECTURES, example_inputs, make_model

# Method, its options, and a format; None for the one that qcli chooses.
FORMS = {
    "w4": ("rtn", {"group_size": 32}, None),
    "w4 zero": ("rtn", {"group_size": 32, "zero_point": True}, None),
    "w4 rows": ("rtn", {"group_size": -1}, None),
    "w4 search": ("rtn", {"group_size": 64, "search": "mse"}, None),
    "w3 zero": ("rtn", {"group_size": 32, "bits": 3, "zero_point": True}, None),
    "w2": ("rtn", {"group_size": 32, "bits": 2, "search": "mse"}, None),
    "w8 rows": ("rtn", {"group_size": -1, "bits": 8}, None),
    "hqq": ("hqq", {}, None),
    "int8": ("int8", {}, None),
    "fp8": ("fp8", {}, None),
    "fp8 blocks": ("fp8", {"share": "block"}, None),
    "fp8 whole": ("fp8", {"share": "tensor", "activations": False}, None),
    "mxfp4": ("mxfp4", {}, None),
    "nvfp4": ("nvfp4", {}, None),
    "gptq 4": ("rtn", {"group_size": 32}, "gptq"),
    "gptq 3 search": ("rtn", {"group_size": 64, "bits": 3, "search": "mse"}, "gptq"),
    "gptq 8 rows": ("rtn", {"group_size": -1, "bits": 8}, "gptq"),
    "awq": ("rtn", {"group_size": 32, "zero_point": True}, "awq"),
    "awq hqq": ("hqq", {}, "awq"),
}
COMPRESSED = [name for name, (_, _, format) in FORMS.items() if format is None]


def written(form, source, out, **settings):
    method, options, format = FORMS[form]
    settings = {name: str(value).lower() for name, value in options.items()} | settings
    qcli.quantize(str(source), out, method=method, settings=settings, format=format, device="cpu")
    return out


def modules_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A tied llama, and a qwen2 with biases."""
    root = tmp_path_factory.mktemp("written")
    for name in ("llama", "qwen2"):
        make_model(name, root / name)
    return root


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("form", COMPRESSED)
def test_compressed_tensors_decodes_the_same(form, name, sources, tmp_path):
    """Weights bit by bit, loaded through transformers, from several shards; and logits of them."""
    out = written(form, sources / name, tmp_path / "out", max_shard_size="40KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        out, quantization_config=CompressedTensorsConfig(dequantize=True), dtype=torch.bfloat16
    )
    theirs.apply(disable_quantization)  # of activations, which compressed-tensors 0.20.0 rounds beside decoded weights, too
    ours, _ = qcli.load(str(out), device="cpu")
    modules = modules_of(ours)
    assert len(modules) == 14
    for path, module in modules.items():
        module.rounds_activations = False
        assert torch.equal(module.dequantize(torch.bfloat16), theirs.get_submodule(path).weight), path
    ids = torch.arange(40)[None]  # more tokens than the kernels for few take: both multiply in bfloat16
    with torch.no_grad():
        a, b = ours(ids).logits, theirs(ids).logits
    torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_holds_what_the_method_makes(form, sources, tmp_path):
    """Chunk by chunk into a file and back is the same as the method on a whole weight; and as quantizing while reading."""
    out = written(form, sources / "qwen2", tmp_path / "out")
    ours, _ = qcli.load(str(out), device="cpu")
    method, options, format = FORMS[form]
    original = load_file(sources / "qwen2" / "model.safetensors")
    shares_absmax = form in ("nvfp4", "fp8 whole")
    for path, module in modules_of(ours).items():
        if not shares_absmax or path.endswith(("down_proj", "o_proj")):
            expected = simulate(make(NAMED[method], options), original[f"{path}.weight"]).weight
            assert torch.equal(module.dequantize(torch.bfloat16), expected.bfloat16()), path
    if shares_absmax:
        return
    settings = {key: str(value).lower() for key, value in options.items()}
    reading, _ = qcli.load(str(sources / "qwen2"), method=method, settings=settings, device="cpu")
    for path, module in modules_of(reading).items():
        assert torch.equal(module.dequantize(torch.bfloat16), ours.get_submodule(path).dequantize(torch.bfloat16)), path


def by_definition(form, state, path):
    """The weight float32 of stored tensors, by docs/formats.md, without any code of qcli."""
    _, options, format = FORMS[form]
    bits = options.get("bits", 4)
    words = state[f"{path}.qweight"].numpy().view(np.uint32)
    scales = state[f"{path}.scales"].float().numpy()
    if format == "gptq":
        stream = np.unpackbits(words.T.copy().view(np.uint8), axis=1, bitorder="little")  # [out, in * bits]
        codes = stream.reshape(words.shape[1], -1, bits) @ (1 << np.arange(bits))
        zeros = state[f"{path}.qzeros"].numpy().view(np.uint32)
        stored = np.unpackbits(zeros.copy().view(np.uint8), axis=1, bitorder="little").reshape(len(zeros), -1, bits)
        zero = stored @ (1 << np.arange(bits)) + 1
        group = state[f"{path}.g_idx"].numpy()
        return ((codes.T - zero[group]) * scales[group]).T
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    slots = lambda w: np.stack([w >> 4 * order.index(i) & 15 for i in range(8)], -1).reshape(len(w), -1)  # noqa: E731
    codes, zero = slots(words).astype(int), slots(state[f"{path}.qzeros"].numpy().view(np.uint32)).astype(int)
    group = np.arange(len(codes)) * len(scales) // len(codes)
    return ((codes - zero[group]) * scales[group]).T


@pytest.mark.parametrize("form", [name for name, (_, _, format) in FORMS.items() if format])
def test_transposed_formats_by_their_definition(form, sources, tmp_path):
    out = written(form, sources / "qwen2", tmp_path / "out")
    state = load_file(out / "model.safetensors")
    ours, _ = qcli.load(str(out), device="cpu")
    for path, module in modules_of(ours).items():
        expected = torch.from_numpy(by_definition(form, state, path).astype(np.float32)).bfloat16()
        assert torch.equal(module.dequantize(torch.bfloat16), expected), path
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    _, options, format = FORMS[form]
    assert (config["quant_method"], config["bits"], config["group_size"]) == (
        format,
        options.get("bits", 4),
        options.get("group_size", 64),
    )


def test_golden_words():
    """Computed by hand, and stated by the libraries' own documents."""
    weight, codes = Weight("m.weight", 8, 32, "BF16"), torch.zeros(8, 32, dtype=torch.int8)
    scheme = make(NAMED["rtn"], {"group_size": 32}).scheme
    codes[0, :8] = torch.arange(8) - 8
    gptq = {p.tensor: p for p in get("gptq").pack(weight, scheme, {"codes": codes, "scale": torch.ones(8, 1)}, 0)}
    assert gptq["m.qweight"].data[0, 0].item() == 0x76543210
    assert (gptq["m.qweight"].stride, gptq["m.qzeros"].data.tolist()) == (32, [[0x77777777]])
    codes = (torch.arange(8, dtype=torch.int8) - 8)[:, None].repeat(1, 32)
    scheme = make(NAMED["rtn"], {"group_size": 32, "zero_point": True}).scheme
    parts = {"codes": codes, "scale": torch.ones(8, 1), "zero_point": torch.zeros(8, 1, dtype=torch.int8)}
    awq = {p.tensor: p for p in get("awq").pack(weight, scheme, parts, 0)}
    assert awq["m.qweight"].data.tolist() == [[0x75316420]] * 32
    assert awq["m.qzeros"].data.view(torch.uint8).tolist() == [[0x88] * 4]
    assert pack_pairs(e2m1_codes(torch.tensor([[1.0, -6.0]]))).tolist() == [[0xF2]]
    assert mx_scales(torch.tensor([1.0, 3.5, 6.0, 7.0, 0.0, torch.inf])).tolist() == [125, 127, 127, 128, 127, 127]


def test_e2m1_rounds_to_the_nearest_and_halves_to_even():
    values = torch.tensor([0.0, 0.25, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.1, 100.0, -0.3, float("nan")])
    assert (e2m1_codes(values) & 7).tolist() == [0, 0, 1, 2, 2, 4, 4, 6, 6, 7, 7, 1, 0]
    assert (e2m1_codes(values) >> 3).tolist() == [0] * 11 + [1, 0]


def test_fused_weights_share_the_scale_of_the_whole(sources, tmp_path):
    """2688 / absmax of q, k and v together, as vLLM fuses them; of gate and up; of the others alone."""
    written("nvfp4", sources / "llama", tmp_path / "out")
    state, original = load_file(tmp_path / "out/model.safetensors"), load_file(sources / "llama/model.safetensors")
    for layer in ("model.layers.0.", "model.layers.1."):
        for parts in (
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["mlp.gate_proj", "mlp.up_proj"],
            ["mlp.down_proj"],
        ):
            absmax = max(original[f"{layer}{part}.weight"].float().abs().max() for part in parts)
            for part in parts:
                assert state[f"{layer}{part}.weight_global_scale"].item() == pytest.approx(2688 / absmax.item(), rel=1e-6)


def test_several_schemes_in_one_folder(sources, tmp_path):
    from qcli.recipe import recipe_of

    rules = [["*.mlp.*", {"method": "nvfp4"}], ["*.o_proj", {"method": "rtn", "options": {"bits": 8, "group_size": 32}}]]
    qcli.quantize(str(sources / "llama"), tmp_path / "out", recipe=recipe_of({"default": {"method": "fp8"}, "rules": rules}, "r"))
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    ours, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    layer = ours.model.layers[1]
    found = [m.scheme.name for m in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.up_proj)]
    assert found == ["fp8", "w8a16", "nvfp4"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for module in modules_of(ours).values():
        module.rounds_activations = False
    ids = torch.arange(40)[None]
    with torch.no_grad():
        a, b = ours(ids).logits.float(), theirs(ids).logits.float()
    assert (a - b).norm() < 0.1 * b.norm()  # theirs rounds the activations of fp8


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "gpt2"])
@pytest.mark.parametrize("form", ["w4 zero", "fp8", "nvfp4", "gptq 4", "awq"])
def test_architectures(form, name, tmp_path):
    """The same modules, and the logits of the weights that they decode to."""
    model_class, _, linears = ARCHITECTURES[name]
    original = make_model(name, tmp_path / "model", torch.float32)
    inputs = example_inputs(original)
    try:
        out = written(form, tmp_path / "model", tmp_path / "out")
    except PlanError as e:
        assert all("do not divide" in p or "no multiple" in p for p in e.problems)
        pytest.skip("groups do not divide its rows")
    ours, _ = qcli.load(str(out), device="cpu")
    modules = modules_of(ours)
    assert len(modules) == linears
    plain = model_class.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    for path, module in modules.items():
        module.rounds_activations = False
        plain.get_submodule(path).weight.data = module.dequantize(torch.float32)
    with torch.no_grad():
        a, b = ours(**inputs).logits, plain(**inputs).logits
    # Of float32 weights, but where products are of bfloat16's compute dtype.
    torch.testing.assert_close(a, b, rtol=0.03, atol=0.03 * float(b.abs().max()))


def test_what_a_format_does_not_hold(sources, tmp_path):
    for method, settings, format, words in (
        ("rtn", {"zero_point": "true"}, "gptq", "symmetric integers"),
        ("rtn", {}, "awq", "with zero points"),
        ("nf4", {}, "compressed-tensors", "not nf4"),
        ("hqq", {"bits": 3}, "awq", "not hqq of 3"),
        ("fp8", {}, "gptq", "not fp8"),
        ("rtn", {}, "bitsandbytes", "not rtn"),
        ("rtn", {}, "fp8", "read, not written"),
        ("rtn", {}, "gguf", "there is no format 'gguf'"),
    ):
        with pytest.raises(UsageError, match=words):
            make_plan(str(sources / "llama"), tmp_path / "out", method=method, settings=settings, format=format)
    for format, name in (("gptq", "gptq"), ("awq", "awq"), ("compressed-tensors", "compressed-tensors")):
        plan = make_plan(str(sources / "llama"), tmp_path / "out", bits=4, group_size=32, format=format)
        assert plan.method.scheme.name == "rtn" and plan.method.scheme.zero_point == (format == "awq")
        assert not plan.problems and plan.quantization_config["quant_method"] == name
    make_model("gpt2", tmp_path / "gpt2")
    plan = make_plan(str(tmp_path / "gpt2"), tmp_path / "out", method="rtn", group_size=32, format="gptq")
    assert any("is a Conv1D" in problem for problem in plan.problems)


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("rtn", {"bits": 5}, "bits is 5, expected one of 2, 3, 4, 8"),
        ("rtn", {"group_size": 0}, "group_size is 0"),
        ("rtn", {"search": "best"}, "search is 'best', expected none, mse or imatrix"),
        ("nf4", {"search": "best"}, "search is 'best'"),
        ("hqq", {"iterations": -1}, "iterations is -1"),
        ("fp8", {"share": "group"}, "share is 'group', expected row, block or tensor"),
        ("mxfp4", {"group_size": 16}, "mxfp4 has no option 'group_size'"),
    ],
)
def test_options_are_checked(method, options, words):
    with pytest.raises(UsageError, match=words):
        make(NAMED[method], options)


@pytest.mark.parametrize(
    "degree, options, expected",
    [
        (1, {"group_size": 64}, []),
        (2, {"group_size": 64}, ["o_proj: parts of 32 columns, which groups of 64 do not divide"]),
        (2, {"group_size": 32}, []),
        (4, {"group_size": 32}, ["o_proj: parts of 16 columns, which groups of 32 do not divide"]),
        (3, {"group_size": 32}, ["q_proj: 64 rows", "o_proj: 64 columns", "gate_proj: 128 rows", "down_proj: 128 columns"]),
    ],
)
def test_what_several_gpus_cannot_share(degree, options, expected, sources, tmp_path):
    plan = make_plan(str(sources / "llama"), tmp_path / "out", method="rtn", tensor_parallel=degree, **options)
    assert len(plan.problems) == len(set(text.partition(": ")[2] for text in expected))
    for text in expected:
        module, _, reason = text.partition(": ")
        assert any(f"{degree} GPUs cannot share: {reason}" in p and module in p for p in plan.problems), (text, plan.problems)


@pytest.mark.parametrize("method", ["nf4", "fp4", "rtn"])
def test_a_search_never_costs_more(method):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[3] *= 20
    plain, searched = (simulate(make(NAMED[method], {"search": s}), weight).weight for s in ("none", "mse"))
    error = [(w - weight).square().sum() for w in (plain, searched)]
    assert error[1] < 0.95 * error[0]
