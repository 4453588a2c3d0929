"""Modules that other people's tools have written decode to what those tools decode them to, bit by bit.

foreign.safetensors holds the tensors of one module of each checkpoint, as llm-compressor, auto-round, GPTQModel, AutoAWQ and
transformers stored them; foreign.json the config, the tool with its version, and the sha256 of the weight that its own code makes
of them. The weights were random numbers.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qcli import formats
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.source import open_source
from qcli.nn import module_for

HERE = Path(__file__).parent
CASES = json.loads((HERE / "foreign.json").read_text())
TENSORS = load_file(HERE / "foreign.safetensors")


def loaded(name, tmp_path):
    """The module of a case, filled with its tensors, and what is stored of it."""
    case = CASES[name]
    state = {f"{case['module']}.{key.split('/')[1]}": t for key, t in TENSORS.items() if key.startswith(f"{name}/")}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": case["config"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = open_source(str(tmp_path))
    format = formats.of_config(source.quantization)
    format.check(source.quantization, "config")
    schemes = formats.quantized_weights(source)
    (codes,) = schemes
    stored = format.read(source, [Linear(codes, case["module"], *case["shape"])], source.quantization)[case["module"]]
    assert (schemes[codes].bits, schemes[codes].codebook) == (stored.scheme.bits, stored.scheme.codebook)
    held = {format.attribute(key.rpartition(".")[2]): tensor for key, tensor in state.items()}
    tensors = {attribute: held[attribute] for attribute in stored.tensors}
    dtype = getattr(torch, case["dtype"])
    return module_for(stored, tensors, bias=False, dtype=dtype, compute_dtype=dtype), dtype


@pytest.mark.parametrize("name", CASES)
def test_decodes_as_its_writer(name, tmp_path):
    module, dtype = loaded(name, tmp_path)
    weight = module.dequantize(dtype)
    assert list(weight.shape) == CASES[name]["shape"]
    weight = weight + 0.0  # -0 is 0
    found = hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    assert found == CASES[name]["sha256"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_multiplies_by_what_it_decodes_to(name, tokens, tmp_path):
    """Within bfloat16's roundings of x, of the weight and of the result, whatever the kernel."""
    module, dtype = loaded(name, tmp_path)
    module.rounds_activations = False
    x = torch.randn(tokens, module.in_features, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    weight = module.dequantize(torch.float32).double()
    y, expected = module(x).double(), x.double() @ weight.t()
    bound = 2.0**-8 * expected.abs() + 2.0**-7 * (x.double().abs() @ weight.abs().t())
    assert y.shape == expected.shape and ((y - expected).abs() <= bound).all()


def test_activations_are_rounded_where_the_scheme_says_so(tmp_path):
    rounding = set()
    for number, name in enumerate(CASES):
        (tmp_path / str(number)).mkdir()
        module, dtype = loaded(name, tmp_path / str(number))
        x = torch.randn(1, 24, module.in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
        rounded = module(x)
        module.rounds_activations = False
        whole = module(x)
        error = ((rounded - whole).float().norm() / whole.float().norm()).item()
        activations = module.scheme.activations
        assert (error > 0) == (activations is not None), name
        if activations:
            assert error < {None: 0.02, "e4m3": 0.06, "e2m1": 0.3}[module.scheme.activation_codebook], (name, error)
            rounding.add((activations, module.scheme.activation_codebook))
    assert rounding >= {("token", None), ("token", "e4m3"), ("static", "e4m3"), ("group", "e4m3"), ("group", "e2m1")}
