"""Models, tokenizers and prompts that cannot be generated from: a sentence each."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch
import transformers as t

import qcli
from qcli.errors import CheckpointError
from qcli.generation import can_generate
from qcli.loading import tokenizer
from tests.models import add_tokenizer, make_model

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 256,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "model"
    make_model("llama", folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture
def copy(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "config, found",
    [
        ({"architectures": ["BertModel"]}, "BertModel does not write text"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM does not write text"),
        ({"architectures": ["MistralModel"]}, "MistralModel does not write text"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "does not write text"),
        ({"architectures": ["T5EncoderModel"]}, "does not write text"),
        ({"architectures": ["ViTForImageClassification"]}, "does not write text"),
        ({"architectures": ["CLIPModel"]}, "does not write text"),
        ({"architectures": ["Wav2Vec2ForCTC"]}, "does not write text"),
        ({"architectures": ["WhisperForConditionalGeneration"]}, "reads input_features, not text alone"),
        ({"architectures": ["VisionEncoderDecoderModel"]}, "reads pixel_values"),
        ({"architectures": ["BlipForConditionalGeneration"]}, "reads pixel_values"),
        ({"architectures": ["MusicgenForConditionalGeneration"]}, "writes audio, not text"),
        ({"model_type": "vit"}, "no model of type vit that writes text"),
    ],
)
def test_models_that_write_no_text(config, found):
    with pytest.raises(CheckpointError, match=found):
        can_generate.check_can_generate(config, "org/name")


@pytest.mark.parametrize(
    "config",
    [
        *({"architectures": [f"{name}ForConditionalGeneration"]} for name in ("T5", "Llava", "Gemma3")),
        *({"architectures": [name]} for name in ("LlamaForCausalLM", "BertLMHeadModel", "OfTomorrow")),
        *({"model_type": name} for name in ("llama", "of_tomorrow")),
        *({"architectures": value} for value in ([], None)),
        {},
    ],
)
def test_models_that_pass(config):
    can_generate.check_can_generate(config, "org/name")


def test_code_that_comes_with_a_checkpoint_is_not_judged():
    config = {"architectures": ["BertModel"], "auto_map": {"AutoModel": "modeling.Mine"}}
    can_generate.check_can_generate(config, "org/name", trust_remote_code=True)


def test_the_command_refuses_an_encoder_before_it_reads_weights(tmp_path, quick_cli, monkeypatch):
    t.BertModel(t.BertConfig(**{n: v for n, v in _SMALL.items() if n != "num_key_value_heads"})).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("qcli.loading.load.load_source", lambda *_, **__: pytest.fail("weights were read"))
    done = quick_cli("generate", "model", "hi")
    assert done.returncode == 1 and "model cannot generate: BertModel does not write text" in done.stderr


def test_tokens_beyond_the_embedding(copy, quick_cli):
    tokens = t.AutoTokenizer.from_pretrained(copy)
    tokens.add_tokens(["tralala"])
    tokens.save_pretrained(copy)
    done = quick_cli("generate", copy, "sing tralala")
    assert done.returncode == 1 and "token 256 of the text ('tralala')" in done.stderr and "256 rows" in done.stderr
    (copy.parent / "text.txt").write_text("sing tralala " * 9)
    for verb in ("evaluate", "inspect-outliers"):
        done = quick_cli(verb, copy, "--text", "text.txt")
        assert done.returncode == 1 and "token 256 of the text ('tralala')" in done.stderr


def test_answers_beyond_the_tokenizer(tmp_path, quick_cli):
    """A vocabulary padded for the hardware: what no token stands for is no text."""
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(**_SMALL | {"vocab_size": 4000}))
    model.save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    done = quick_cli("generate", "model", "hi", "--json", "--max-new-tokens", 8, "--temperature", 2, "--seed", 1)
    assert done.returncode == 0 and max(json.loads(done.stdout)["token_ids"]) > 256, done.stderr


def damaged(folder, name, content):
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Tomorrow"}}'),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": "long"}'),
        ("tokenizer_config.json", '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": 5}'),
    ],
)
def test_damaged_tokenizers(name, content, copy, quick_cli):
    damaged(copy, name, content)
    done = quick_cli("generate", copy, "hi", "--max-new-tokens", 1)
    assert done.returncode == 1 and "tokenizer" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error, files, found",
    [
        (ImportError("Mistral requires `mistral-common`: pip install mistral-common"), ["tekken.json"], "mistral-common"),
        (ValueError("you need to have sentencepiece or tiktoken installed"), ["spiece.model"], "sentencepiece or tiktoken"),
        (ImportError("\nFunnyTokenizer requires the SentencePiece library (sentencepiece)"), ["tokenizer.model"], "sentencepiece"),
        (ImportError("You need to install fugashi to use MecabTokenizer"), ["vocab.txt"], "fugashi"),
        (ImportError("you need\na rare library"), ["vocab.txt"], "you need a rare library"),
    ],
)
def test_a_tokenizer_that_needs_what_is_not_installed(error, files, found, monkeypatch):
    class Place:
        names = files

    class Source:
        place, label, config_folder = Place, "org/name", "nowhere"

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(t.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(CheckpointError, match=f"org/name: its tokenizer needs .*{found}"):
        tokenizer.read_tokenizer(Source, False, None)


def test_a_panic_in_the_tokenizer_s_library(copy, monkeypatch, quick_cli):
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic(*_, **__):
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(t.AutoTokenizer, "from_pretrained", panic)
    done = quick_cli("generate", copy, "hi")
    assert done.returncode == 1 and "its tokenizer cannot be loaded: called `Option" in done.stderr


def test_a_tokenizer_of_code(copy, quick_cli):
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": ["mine.MineTokenizer", None]}}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    done = quick_cli("generate", copy, "hi")
    assert done.returncode == 1 and "Pass --trust-remote-code" in done.stderr


def test_no_tokenizer(copy, quick_cli):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    done = quick_cli("generate", copy, "hi")
    assert done.returncode == 1 and "has no tokenizer" in done.stderr


def test_a_tokenizer_that_fails_over_the_prompt(llama, quick_cli, monkeypatch):
    def fail(self, *_, **__):
        raise Exception("WordPiece error: missing [UNK] token")  # noqa: TRY002, as tokenizers does

    monkeypatch.setattr(t.PreTrainedTokenizerFast, "__call__", fail)
    done = quick_cli("generate", llama, "hi")
    assert done.returncode == 1 and "cannot read the prompt: WordPiece error" in done.stderr


def test_a_processor_s_chat_template(copy, quick_cli):
    (copy / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    done = quick_cli("generate", copy, "hello", "--chat", "--json", "--max-new-tokens", 1)
    assert done.returncode == 0 and json.loads(done.stdout)["prompt_tokens"] == 5
    (copy / "chat_template.json").write_text("[")
    done = quick_cli("generate", copy, "hello", "--chat")
    assert done.returncode == 1 and "chat_template.json is not valid JSON" in done.stderr


@pytest.mark.parametrize(
    "content, options, code, found",
    [
        (b"", (), 0, '"prompt_tokens": 1'),
        (b"", ("--chat",), 2, "the message is empty"),
        (b"  \n", (), 0, '"prompt_tokens": 3'),
        (b"\xef\xbb\xbfhi", (), 0, '"prompt_tokens": 2'),
        (b"caf\xe9", (), 2, "cannot read the prompt from prompt.txt"),
        ("hi".encode("utf-16"), (), 2, "cannot read the prompt from prompt.txt"),
    ],
)
def test_prompt_files(content, options, code, found, llama, quick_cli, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(content)
    done = quick_cli("generate", llama, "--prompt-file", "prompt.txt", "--json", "--max-new-tokens", 1, *options)
    assert done.returncode == code and found in done.stdout + done.stderr


def test_prompt_files_that_are_none(llama, quick_cli, tmp_path):
    for name in ("absent.txt", "."):
        done = quick_cli("generate", llama, "--prompt-file", name)
        assert done.returncode == 2 and f"cannot read the prompt from {name}" in done.stderr


def test_an_empty_prompt_without_a_beginning(copy, quick_cli):
    tokens = t.AutoTokenizer.from_pretrained(copy)
    tokens.bos_token = None
    tokens.save_pretrained(copy)
    done = quick_cli("generate", copy, "")
    assert done.returncode == 2 and "the prompt is empty" in done.stderr


def test_an_argument_that_is_no_text(llama, quick_cli):
    done = quick_cli("generate", llama, "caf\udce9")
    assert done.returncode == 2 and "not valid UTF-8 at character 4" in done.stderr


def test_stdin_that_is_no_text(llama, quick_cli, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    done = quick_cli("generate", llama, "-")
    assert done.returncode == 2 and "cannot read the prompt from stdin" in done.stderr


def test_what_transformers_raises_while_it_generates(llama, quick_cli, monkeypatch):
    def fail(self, *_, **__):
        raise ValueError("no such mode\nlong advice")

    monkeypatch.setattr(t.LlamaForCausalLM, "generate", fail)
    done = quick_cli("generate", llama, "hi")
    assert done.returncode == 1 and "LlamaForCausalLM cannot continue this prompt: no such mode\n" in done.stderr


def test_what_the_listener_raises_is_left_alone(llama):
    from qcli.generation import decode

    def refuse(token):
        raise ValueError("mine")

    model, tokens = qcli.load(str(llama), device="cpu")
    with pytest.raises(ValueError, match="mine"):
        decode.generate(model, tokens, [5], decode.Sampling(max_new_tokens=2), refuse)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_composite_models_continue_a_text(name, tmp_path, quick_cli):
    torch.manual_seed(0)
    if name == "llava":
        config = t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION, projection_dim=32),
            text_config=t.LlamaConfig(**_SMALL),
            image_token_index=250,
        )
        model = t.LlavaForConditionalGeneration(config)
    else:
        text = t.Gemma3TextConfig(**_SMALL | {"num_hidden_layers": 2}, head_dim=16)
        config = t.Gemma3Config(
            text_config=text, vision_config=t.SiglipVisionConfig(**VISION), mm_tokens_per_image=4, image_token_index=250
        )
        model = t.Gemma3ForConditionalGeneration(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    add_tokenizer(tmp_path / "model")
    done = quick_cli("generate", "model", "hello", "--json", "--max-new-tokens", 6)
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([t.AutoTokenizer.from_pretrained(tmp_path / "model")("hello")["input_ids"]])
    theirs = (
        type(model)
        .from_pretrained(tmp_path / "model")
        .eval()
        .generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=255)
    )
    assert json.loads(done.stdout)["token_ids"] == theirs[0, 5:].tolist()
