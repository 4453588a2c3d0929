"""Modules and whole models on the GPU compared with the CPU, and the command line."""

import pytest
import torch

import qcli
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit
from tests.conftest import ROOT
from tests.gpu.checks import noting

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error::qcli.errors.QcliWarning")]

DEMO = ROOT / "examples" / "demo-model"
PROMPT = "Once upon a time there was"
KINDS = [(4, True, "linear_4bit"), (8, True, "linear_int8"), (8, False, "linear_w8a16")]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind[2] if isinstance(kind, tuple) else str(kind))
def quantized(request, tmp_path_factory):
    """The demo model in bfloat16. Its 4-bit blocks divide every layer's columns, so kernels run all layers."""
    bits, int8_activations, kernel = request.param
    folder = tmp_path_factory.mktemp("models") / "model"
    options = {"block_size": 32} if bits == 4 else {}
    qcli.quantize(str(DEMO), folder, bits=bits, dtype="bfloat16", device="cpu", **options)
    return folder, int8_activations, kernel


@pytest.mark.parametrize("tokens", [1, 6, 50])
def test_logits(tokens, quantized, device):
    folder, int8_activations, kernel = quantized
    found = {}
    ids = torch.randint(5, 300, (1, tokens))
    for where in ("cpu", "cuda"):
        model, _ = qcli.load(str(folder), device=where, int8_activations=int8_activations)
        with torch.inference_mode(), noting() as launched:
            found[where] = model(ids.to(where)).logits.float().cpu()
    if tokens <= 8:
        assert kernel in launched
    # Activations between layers are bfloat16: a difference in rounding reaches the next layer.
    assert (found["cuda"] - found["cpu"]).norm() / found["cpu"].norm() < 0.01


def test_modules(quantized, device):
    """Each module is tested alone, so differences of earlier modules do not matter."""
    folder, int8_activations, _ = quantized
    here, _ = qcli.load(str(folder), device="cpu", int8_activations=int8_activations)
    there, _ = qcli.load(str(folder), device="cuda", int8_activations=int8_activations)
    modules = dict(there.named_modules())
    count = 0
    for name, module in here.named_modules():
        if not isinstance(module, (Linear4bit, Linear8bit)):
            continue
        count += 1
        assert torch.equal(modules[name].dequantize(torch.float32).cpu(), module.dequantize(torch.float32))
        for shape in ((module.in_features,), (3, module.in_features), (2, 20, module.in_features)):
            x = torch.randn(shape).bfloat16()
            with torch.inference_mode():
                expected, found = module(x).float(), modules[name](x.cuda()).float().cpu()
            assert found.shape == expected.shape
            assert (found - expected).norm() / expected.norm() < 0.01, (name, shape)
    assert count > 20


def test_stored_weights_come_back_as_they_were(quantized, device):
    folder, int8_activations, _ = quantized
    here, _ = qcli.load(str(folder), device="cpu", int8_activations=int8_activations)
    there, _ = qcli.load(str(folder), device="cuda", int8_activations=int8_activations)
    with torch.inference_mode():
        there(torch.tensor([[5, 6, 7]], device=device))
    theirs = there.state_dict()
    assert all(torch.equal(tensor, theirs[name].cpu()) for name, tensor in here.state_dict().items())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_on_the_gpu_writes_the_same_files(bits, device, tmp_path):
    for where in ("cpu", "cuda"):
        qcli.quantize(str(DEMO), tmp_path / where, bits=bits, device=where)
    files = sorted(path.name for path in (tmp_path / "cpu").glob("*.safetensors"))
    assert files
    for name in files:
        assert (tmp_path / "cpu" / name).read_bytes() == (tmp_path / "cuda" / name).read_bytes()


@pytest.mark.parametrize("bits", [4, 8])
def test_generate_says_the_same_as_on_the_cpu(bits, device, cli):
    """In float32 another order of summation does not change a token."""
    options = ("--bits", bits, "--dtype", "float32", "--temperature", 0, "--max-new-tokens", 60)
    there, here = (cli("generate", DEMO, *options, "--device", where, PROMPT) for where in ("cuda", "cpu"))
    assert (there.returncode, here.returncode) == (0, 0), there.stderr + here.stderr
    assert there.stdout == here.stdout and len(there.stdout) > 50
    assert "plain torch runs" not in there.stderr
