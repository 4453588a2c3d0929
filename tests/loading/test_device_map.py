"""Models split by accelerate's rules: what is parsed, what our quantizer tells of sizes, and modules whose weights come and go."""

import accelerate
import pytest
import torch
import transformers
from transformers.integrations.accelerate import compute_module_sizes, infer_auto_device_map

import qcli
from qcli import devices
from qcli.errors import DeviceError, UsageError
from qcli.generation import decode
from qcli.loading.transformers_quantizer import QcliConfig, QcliQuantizer
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit
from qcli.recipe import Choice, Recipe
from tests.conftest import ROOT
from tests.models import make_model

DEMO = ROOT / "examples" / "demo-model"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model, and what `qcli quantize` makes of it."""
    folder = tmp_path_factory.mktemp("split")
    make_model("llama", folder / "model")
    for bits in (4, 8):
        qcli.quantize(str(folder / "model"), folder / f"out{bits}", bits=bits)
    return folder


@pytest.fixture
def gpus(monkeypatch):
    """Says that there are two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def loaded_bytes(model) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def test_limits_are_read(gpus):
    assert devices.parse_max_memory("0=20GB, 1=20GiB,cpu=1.5TB") == {0: 20 * 10**9, 1: 20 * 2**30, "cpu": 15 * 10**11}
    assert devices.parse_max_memory({0: "500MB", "cpu": 7}) == {0: 5 * 10**8, "cpu": 7}
    placement = devices.place("auto", "auto", "cpu=30GB,0=20GB")
    assert placement.arguments() == {"device_map": "auto", "max_memory": {0: 20 * 10**9, "cpu": 30 * 10**9}}
    assert placement.gpus() == [0] and "20.00 GB on GPU 0" in placement.limits() and "on the CPU" in placement.limits()
    assert devices.place("auto", "auto", None).gpus() == [0, 1]
    assert devices.place("auto", {"a": 1, "b": "cpu", "c": "cuda:0", "d": torch.device("cpu")}, None).gpus() == [0, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("gpu0=20GB", "names the device 'gpu0', expected a GPU's number or cpu"),
        ("disk=20GB", "names the device 'disk'"),
        ("0", "has no size for 0"),
        ("0=", "has no size for 0"),
        ("", "names the device ''"),
        ("0=1GB,0=2GB", "names 0 twice"),
        ("0=twenty", "--max-memory of 0 is 'twenty', expected a number with a unit"),
        ("cpu=1PB", "--max-memory of cpu is '1PB'"),
    ],
)
def test_limits_that_cannot_be_read(text, message, gpus):
    with pytest.raises(UsageError) as refused:
        devices.parse_max_memory(text)
    assert message in refused.value.message and refused.value.hint


def test_a_gpu_that_is_not_there(gpus, monkeypatch):
    with pytest.raises(DeviceError, match="names GPU 2, but there are 2, from 0 on"):
        devices.parse_max_memory("2=1GB")
    for count, words in ((1, "there is only GPU 0"), (0, "there is none")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(DeviceError, match=words):
            devices.parse_max_memory("1=1GB")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("cpu", "auto", None), "--device cpu and --device-map were both given"),
        (("auto", None, "cpu=1GB"), "--max-memory was given without --device-map"),
        (("auto", "balanced", None), "--device-map is 'balanced', expected auto"),
        (("auto", {"": "cpu"}, "cpu=1GB"), "names every device"),
    ],
)
def test_options_that_contradict(arguments, message):
    with pytest.raises(UsageError, match=message):
        devices.place(*arguments)


@pytest.mark.parametrize("method, bits", [("nf4", 4), ("llm-int8", 8)])
@pytest.mark.parametrize("stored", [True, False])
def test_a_model_fits_where_its_quantized_bytes_do(method, bits, stored, folder):
    """To the byte: the map is made of what will be loaded, not of 16-bit sizes."""
    source = folder / (f"out{bits}" if stored else "model")
    options = {} if stored else {"method": method}
    size = loaded_bytes(qcli.load(str(source), device="cpu", **options)[0])
    split, _ = qcli.load(str(source), device_map="auto", max_memory={"cpu": size}, **options)
    assert sum(isinstance(m, (Linear4bit, Linear8bit)) for m in split.modules()) == 14 and loaded_bytes(split) == size
    with pytest.raises(DeviceError) as refused:
        qcli.load(str(source), device_map="auto", max_memory={"cpu": size - 1}, **options)
    assert "do not fit" in refused.value.message and "on the CPU; qcli keeps none on disk" in refused.value.message
    assert ("--bits 4" in refused.value.hint) == (bits == 8 and not stored)


def test_an_unquantized_model_that_does_not_fit(folder):
    with pytest.raises(DeviceError) as refused:
        qcli.load(str(folder / "model"), device_map="auto", max_memory="cpu=200kB")
    assert "need 214 kB and do not fit 200 kB on the CPU" in refused.value.message
    assert refused.value.hint == "Try --bits 8 (144 kB) or --bits 4 (120 kB) or a larger --max-memory."
    with pytest.raises(DeviceError, match="where the device map puts them"):
        qcli.load(str(folder / "model"), bits=4, device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize("method, bits", [("nf4", 4), ("llm-int8", 8)])
def test_layers_are_shared_out_by_their_quantized_size(method, bits, folder):
    """Two GPUs that are not there: each takes the layers that it has room for, the CPU the rest."""
    config = transformers.AutoConfig.from_pretrained(folder / "model")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    quantizer = QcliQuantizer(QcliConfig(recipe=Recipe(Choice(method))), pre_quantized=False)
    quantizer.preprocess_model(model)
    sizes, _ = compute_module_sizes(model, quantizer)
    loaded, _ = qcli.load(str(folder / "model"), bits=bits, device="cpu")
    for name in ("model.layers.0", "model.embed_tokens", "lm_head"):
        module = loaded.get_submodule(name)
        assert sizes[name] == sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    layer = sizes["model.layers.0"]
    largest = max(layer, sizes["lm_head"])  # room that is kept for what comes in from the CPU
    limits = {0: sizes["model.embed_tokens"] + layer + largest, 1: sizes["lm_head"] + 2 * layer + largest, "cpu": 10**9}
    placed = infer_auto_device_map(
        model, max_memory=limits, no_split_module_classes=model._no_split_modules, hf_quantizer=quantizer
    )
    assert placed["model.layers.0"] == 0 and placed["model.layers.1"] == 1 and placed["lm_head"] == 1


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("buffers", [False, True])
def test_weights_that_come_and_go(bits, buffers):
    """As accelerate keeps layers in the CPU's memory: brought in for their product and taken away again. The same tokens, and
    no module keeps what was brought."""
    model, tokenizer = qcli.load(str(DEMO), bits=bits, device="cpu", dtype="float32")
    prompt, sampling = tokenizer("One rainy day")["input_ids"], decode.Sampling(max_new_tokens=20)
    expected = decode.generate(model, tokenizer, prompt, sampling, lambda token: None)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=buffers)
    assert all(parameter.is_meta for parameter in model.parameters())
    result = decode.generate(model, tokenizer, prompt, sampling, lambda token: None)
    assert result.token_ids == expected.token_ids
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(getattr(module, "_prepared", None) is None for module in model.modules())


def test_the_command(folder, quick_cli):
    done = quick_cli("generate", DEMO, "Once", "--device-map", "auto", "--max-memory", "cpu=1GB", "--bits", "4")
    plain = quick_cli("generate", DEMO, "Once", "--bits", "4")
    assert done.returncode == 0 and done.stdout == plain.stdout
    done = quick_cli("generate", DEMO, "Once", "--device-map", "auto", "--max-memory", "cpu=500kB", "--bits", "4")
    assert done.returncode == 1 and "do not fit 500 kB on the CPU" in done.stderr and "Traceback" not in done.stderr
    done = quick_cli("generate", DEMO, "Once", "--device-map", "auto", "--max-memory", "cpu=lots")
    assert done.returncode == 2 and "expected a number with a unit" in done.stderr


def test_whole_activations(quick_cli):
    """For an LLM.int8() model, and for no other."""
    model, tokenizer = qcli.load(str(DEMO), bits=8, int8_activations=False, device="cpu")
    modules = [m for m in model.modules() if isinstance(m, Linear8bit)]
    assert len(modules) == 42 and not any(m.rounds_activations for m in modules)
    ids = torch.tensor([tokenizer("One rainy day Tom found a")["input_ids"]])
    original, _ = qcli.load(str(DEMO), device="cpu")
    with torch.no_grad():
        exact = original(ids).logits.double()
        whole = (model(ids).logits.double() - exact).square().mean()
        for module in modules:
            module.rounds_activations = True
        rounded = (model(ids).logits.double() - exact).square().mean()
    assert whole < rounded
    assert quick_cli("generate", DEMO, "Once", "--bits", "8", "--no-int8-activations").returncode == 0
    done = quick_cli("generate", DEMO, "Once", "--bits", "4", "--no-int8-activations")
    assert done.returncode == 2 and "rounds no activations" in done.stderr
