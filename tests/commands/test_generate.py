"""`qcli generate` and `qcli.load`: the tokens of transformers with bitsandbytes, streamed whole, from quantized models or not."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers

import qcli
from qcli import formats
from qcli.generation import decode
from qcli.generation.text_stream import TextStream
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit
from qcli.runtime import cpu
from tests.adapters import make_adapter
from tests.conftest import ROOT
from tests.models import add_tokenizer, example_inputs, make_model

DEMO = ROOT / "examples" / "demo-model"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The bundled model, quantized in several ways."""
    folder = tmp_path_factory.mktemp("demo")
    qcli.quantize(str(DEMO), folder / "nf4")
    qcli.quantize(str(DEMO), folder / "nf4-plain", double_quant=False)
    qcli.quantize(str(DEMO), folder / "nf4-float32", dtype="float32", settings={"compute_dtype": "float32"})
    qcli.quantize(str(DEMO), folder / "int8", bits=8)
    return folder


PROMPTS = ("Once", "Long ago there lived", "One rainy day Tom found a", "The bear")


def greedy(model, ids):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60)


@pytest.fixture
def no_fused_kernel(monkeypatch):
    """bitsandbytes' common path. On processors with AVX512_BF16 it has a fused one, which computes in bfloat16 whatever the
    compute dtype, sums in another order, and runs no block size that does not divide the width."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


@pytest.mark.parametrize(
    "name, variant", [("nf4", None), ("nf4-plain", None), ("nf4-float32", None), ("nf4-float32", cpu.variant())]
)
def test_greedy_tokens_equal_transformers_with_bitsandbytes(name, variant, demo, no_fused_kernel):
    """In bfloat16 the reference rounds weights as bitsandbytes does; the kernels do not round them, see below."""
    ours, tokenizer = qcli.load(str(demo / name), device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo / name).eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.no_grad(), cpu.using(variant):
            assert torch.equal(greedy(ours, ids), greedy(theirs, ids))
            tolerance = 1e-4 if name == "nf4-float32" else 0.01
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["nf4", "nf4-plain"])
def test_kernels_differ_by_rounding_only(name, demo):
    """The grammar has exact ties (ten names, equally likely), so where one of the two sums in another order or rounds less a
    token may differ, but only where two logits are as close as bfloat16 rounds them."""
    ours, tokenizer = qcli.load(str(demo / name), device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo / name).eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        made = greedy(ours, ids)
        with torch.no_grad():
            a, b = ours(made).logits[0].float(), theirs(made).logits[0].float()
        rounding = 0.02 * b.abs().max()
        assert (a - b).abs().max() <= rounding
        chosen = b[ids.shape[1] - 1 : -1].gather(1, made[0, ids.shape[1] :, None])[:, 0]
        assert (b[ids.shape[1] - 1 : -1].amax(1) - chosen <= rounding).all()


def test_int8_is_the_formula_and_close_to_bitsandbytes(demo):
    """Greedy tokens are those of the formula in float64. bitsandbytes' logits differ: it casts activations to float16 and its
    CPU constant is 1.8e-5 too large."""
    ours, tokenizer = qcli.load(str(demo / "int8"), device="cpu")
    exact, _ = qcli.load(str(demo / "int8"), device="cpu")
    for module in exact.modules():
        if isinstance(module, Linear8bit):
            module.forward = formula(module)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(demo / "int8").eval()
    ids = torch.tensor([tokenizer("Once upon a time there was")["input_ids"]])
    assert torch.equal(greedy(ours, ids), greedy(exact, ids))
    with torch.no_grad():
        a, b, c = (m(ids).logits.float() for m in (ours, theirs, exact))
    assert (a - c).abs().max() <= 0.02 * c.abs().max() and (a - b).abs().max() <= 0.05 * b.abs().max()


def formula(module: Linear8bit):
    """LLM.int8() in integers and float64, rounded once."""

    def forward(x):
        rows = x.reshape(-1, x.shape[-1]).double()
        outliers = (rows.abs() >= 6.0).any(0)
        kept = rows.masked_fill(rows.abs() >= 6.0, 0)
        absmax = kept.abs().amax(1, keepdim=True)
        kept = kept.masked_fill(outliers, 0)
        q = torch.round((kept.float() * (127.0 / absmax.float())).double())
        weight, scale = module.weight.double(), module.SCB.double()
        y = (q @ weight.t()) * absmax * scale / 127**2
        dequantized = (weight * scale[:, None] / 127).to(x.dtype).double()
        y += rows[:, outliers] @ dequantized[:, outliers].t()
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    return forward


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_while_reading_equals_quantizing_first(name, bits, tmp_path):
    original = make_model(name, tmp_path / "model")
    report = qcli.quantize(str(tmp_path / "model"), tmp_path / "out", bits=bits)
    first, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    reading, _ = qcli.load(str(tmp_path / "model"), bits=bits, device="cpu")
    kind = Linear4bit if bits == 4 else Linear8bit
    for model in (first, reading):
        assert sum(isinstance(m, kind) for m in model.modules()) == report.quantized_modules
    with torch.no_grad():
        a, b = (m(**example_inputs(original)).logits for m in (first, reading))
    assert torch.equal(a, b)


def test_modules_give_the_stored_form_back(demo):
    """All but the tables and the description of the rest, which no kernel reads."""
    from safetensors.torch import load_file

    beside = ("quant_map", "quant_state.bitsandbytes__nf4", "weight_format")

    for name in ("nf4", "nf4-plain", "int8"):
        stored = load_file(demo / name / "model.safetensors")
        model, _ = qcli.load(str(demo / name), device="cpu")
        path = "model.layers.0.mlp.down_proj"
        mine = model.get_submodule(path).state_dict()
        theirs = {
            n.removeprefix(f"{path}."): tensor
            for n, tensor in stored.items()
            if n.startswith(f"{path}.") and not n.endswith(beside)
        }
        attribute = formats.get("bitsandbytes").attribute
        assert mine.keys() == {attribute(n) for n in theirs}
        assert all(torch.equal(mine[attribute(n)], tensor) for n, tensor in theirs.items())


def test_a_checkpoint_of_transformers_and_bitsandbytes(tmp_path):
    """Another block of quant storage and a saved-by-others folder: read from what each tensor says."""
    make_model("llama", tmp_path / "model")
    for storage in (torch.uint8, torch.bfloat16):
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_quant_storage=storage
        )
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=config)
        out = tmp_path / str(storage)
        theirs.save_pretrained(out)
        ours, _ = qcli.load(str(out), device="cpu")
        ids = torch.arange(1, 17)[None]
        with torch.no_grad():
            a, b = ours(ids).logits.float(), theirs.eval()(ids).logits.float()
        assert (a - b).abs().max() <= 0.02 * b.abs().max()


def test_an_unquantized_model_runs_as_it_is(tmp_path):
    make_model("llama", tmp_path / "model")
    model, tokenizer = qcli.load(str(tmp_path / "model"), device="cpu")
    assert tokenizer is None
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("block_size", [32, 4096])
def test_other_block_sizes(block_size, tmp_path, no_fused_kernel):
    make_model("llama", tmp_path / "model")
    qcli.quantize(str(tmp_path / "model"), tmp_path / "out", block_size=block_size)
    model, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = theirs.get_submodule(path).weight
            flat = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).view(-1)
            assert module.block_size == block_size
            if module.in_features % block_size == 0:  # its AVX-512 path decodes blocks that straddle rows wrongly
                assert torch.equal(module.dequantize(torch.bfloat16).view(-1), flat)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()


def test_the_command_streams_text_and_tells_on_stderr(demo, quick_cli):
    done = quick_cli("generate", demo / "nf4", "Once upon a time")
    assert done.returncode == 0 and done.stdout.startswith(" there was") and done.stdout.endswith(".\n")
    assert done.stderr.count("\n") == 1 and "prompt tokens at" in done.stderr and "peak memory" in done.stderr
    as_json = json.loads(quick_cli("generate", demo / "nf4", "Once upon a time", "--json").stdout)
    assert as_json["text"] + "\n" == done.stdout and as_json["finished"] and as_json["new_tokens"] == len(as_json["token_ids"])
    short = json.loads(quick_cli("generate", demo / "nf4", "Once", "--max-new-tokens", "5", "--json").stdout)
    assert short["new_tokens"] == 5 and not short["finished"]


def test_prompts_from_file_and_stdin(demo, cli, quick_cli, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon a time")
    texts = {
        quick_cli("generate", demo / "int8", "--prompt-file", "prompt.txt").stdout,
        quick_cli("generate", demo / "int8", "-", stdin="Once upon a time").stdout,
        cli("generate", demo / "int8", stdin="Once upon a time").stdout,
    }
    assert len(texts) == 1 and texts.pop().startswith(" there was")


def test_sampling(demo, quick_cli):
    def text(*options):
        done = quick_cli("generate", demo / "nf4", "Once", "--temperature", "1.5", "--max-new-tokens", "30", *options)
        assert done.returncode == 0
        return done.stdout

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    coldest = quick_cli("generate", demo / "nf4", "Once", "--temperature", "0", "--max-new-tokens", "30").stdout
    assert coldest == quick_cli("generate", demo / "nf4", "Once", "--max-new-tokens", "30").stdout


def test_an_empty_prompt_begins_at_the_beginning(demo, quick_cli):
    assert quick_cli("generate", demo / "nf4", "").stdout.strip().startswith(("Once", "Long"))


def test_a_prompt_longer_than_the_context(demo, quick_cli):
    with pytest.warns(qcli.errors.QcliWarning, match="the model was made for 512"):
        done = quick_cli("generate", demo / "nf4", "the bear " * 600, "--max-new-tokens", 2, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["prompt_tokens"] > 512


def chat_model(folder: Path) -> Path:
    make_model("llama", folder)
    add_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return folder


def test_chat(tmp_path, quick_cli):
    chat_model(tmp_path / "model")
    once = quick_cli("generate", "model", "hi", "--chat", "--max-new-tokens", "4", "--json")
    assert once.returncode == 0, once.stderr
    assert json.loads(once.stdout)["prompt_tokens"] == len("<user>hi<assistant>")
    talk = quick_cli("generate", "model", "--chat", "--max-new-tokens", "3", stdin="hi\n\nyo\n/exit\n")
    assert talk.returncode == 0, talk.stderr
    first, second = [line for line in talk.stderr.splitlines() if "prompt tokens" in line]
    assert int(second.rpartition("[")[2].split()[0]) > int(first.rpartition("[")[2].split()[0]) + len("<user>yo")


def test_chat_without_a_template(demo, quick_cli):
    done = quick_cli("generate", demo / "nf4", "hi", "--chat")
    assert done.returncode == 1 and "has no chat template" in done.stderr


def test_end_tokens_may_be_many(tmp_path):
    model, tokenizer = qcli.load(str(chat_model(tmp_path / "model")), device="cpu")
    ids = tokenizer("abc")["input_ids"]
    free = decode.generate(model, tokenizer, ids, decode.Sampling(max_new_tokens=20), lambda token: None)
    stop = free.token_ids[5]
    model.generation_config.eos_token_id = [7, stop]
    heard = []
    result = decode.generate(model, tokenizer, ids, decode.Sampling(max_new_tokens=20), heard.append)
    assert result.finished and result.token_ids == heard == free.token_ids[: free.token_ids.index(stop) + 1]


def test_text_comes_in_whole_characters():
    """A byte-level tokenizer splits an emoji and an umlaut; nothing is shown until they are whole."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    text = "a 🦊 fox, grün\n  日本 ok"
    ids = fast(text)["input_ids"]
    stream = TextStream(fast, fast("start: ")["input_ids"])
    pieces = [stream.push(i) for i in ids]
    assert len(ids) == len(text.encode()) and "".join(pieces) + stream.flush() == text
    assert all("\N{REPLACEMENT CHARACTER}" not in p for p in pieces) and sum(p == "" for p in pieces) == 3 + 1 + 2 + 2
    cut = TextStream(fast, [])
    assert "".join(cut.push(i) for i in fast("ok🦊")["input_ids"][:-1]) == "ok"
    assert cut.flush() == "\N{REPLACEMENT CHARACTER}"


def test_words_keep_their_spaces():
    """A word-piece prefix marks a space that a token alone does not show."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"▁": 0, "▁the": 1, "▁fox": 2, "es": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    stream = TextStream(fast, [1])
    assert [stream.push(i) for i in (2, 3, 1)] == [" fox", "es", " the"]


def test_ctrl_c_while_generating(demo, quick_cli, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "push", interrupt)
    done = quick_cli("generate", demo / "nf4", "Once")
    assert done.returncode == 130 and "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_an_adapter_changes_the_text(quick_cli, tmp_path, demo):
    make_adapter(transformers.AutoModelForCausalLM.from_pretrained(DEMO), tmp_path / "adapter")
    arguments = ("generate", demo / "nf4", "Once", "--max-new-tokens", 20, "--device", "cpu", "--json")
    plain, adapted = (json.loads(quick_cli(*arguments, *more).stdout) for more in ((), ("--adapter", "adapter")))
    model, tokenizer = qcli.load(str(demo / "nf4"), adapter=str(tmp_path / "adapter"), device="cpu")
    ids = torch.tensor([tokenizer("Once")["input_ids"]])
    expected = model.generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :].tolist()
    assert adapted["token_ids"][:8] == expected[:8] != plain["token_ids"][:8]  # the step rounds in other places
    assert adapted["step"] == plain["step"] and adapted["bytes_per_step"] > plain["bytes_per_step"]
    done = quick_cli("generate", demo / "nf4", "Once", "--adapter", demo / "nf4")
    assert done.returncode == 1 and "has no adapter_config.json" in done.stderr
