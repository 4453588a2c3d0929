"""--chat: what templates may do, what ends an answer, and the conversation turn by turn."""

import json
import os
import re
import signal

import pytest
import transformers as t

import qcli
from qcli.errors import CheckpointError, UsageError
from qcli.generation import decode
from qcli.generation.chat import Chat
from qcli.generation.text_stream import TextStream
from tests.models import make_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


def tokenizer_of(template=None, eos="</s>", special=("<s>", "</s>", "<|im_start|>", "<|im_end|>"), folder=None):
    """A tokenizer of bytes, of which two have made room for special tokens 252 to 255."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:252]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[], unk_token=alphabet[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    made = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token=eos, chat_template=template)
    if folder is not None:
        made.save_pretrained(folder)
    return made


IM_END = 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    make_model("llama", folder)
    tokenizer_of(CHATML, folder=folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return qcli.load(str(folder), device="cpu")


def test_a_conversation_is_what_the_template_makes_of_it(model):
    loaded, tokenizer = model
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "he"}]
    expected = t.PreTrainedTokenizerFast.apply_chat_template(tokenizer, messages, add_generation_prompt=True)["input_ids"]
    assert Chat(tokenizer, "m").ids(loaded, messages) == expected


@pytest.mark.parametrize(
    "template, found",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ({"rag": CHATML, "tool_use": CHATML}, "no default among its chat templates: rag, tool_use"),
        ("{% for m in messages %}{{ m }", "unexpected '}'"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("a fixed text", "drops the user's message"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}", "no system message"),
    ],
)
def test_templates_that_do_not_take_a_message(template, found):
    with pytest.raises(CheckpointError, match=re.escape(found)) as refused:
        Chat(tokenizer_of(template), "the model")
    assert "the model" in refused.value.message


def test_one_default_among_several_templates(model):
    messages = [{"role": "user", "content": "hi"}]
    several = Chat(tokenizer_of({"default": CHATML, "rag": "no"}), "m")
    assert several.ids(model[0], messages) == Chat(tokenizer_of(CHATML), "m").ids(model[0], messages)


def test_content_in_parts_where_the_template_wants_it(model):
    chat, tokenizer = Chat(tokenizer_of(PARTS), "m"), tokenizer_of()
    assert chat.in_parts and chat.turn_end == IM_END
    assert chat.ids(model[0], [{"role": "user", "content": "hi"}]) == tokenizer("hi<|im_end|>:")["input_ids"]
    strict = PARTS.replace("{{ c['text'] }}", "{{ c.text + '' }}")  # raises over a letter of a plain text
    assert Chat(tokenizer_of(strict), "m").in_parts
    assert not Chat(tokenizer_of(CHATML), "m").in_parts


def test_a_template_that_makes_nothing(model):
    with pytest.raises(CheckpointError, match="returns an empty text"):
        Chat(tokenizer_of("{% if messages[0].content == 'marmalade' %}marmalade{% endif %}"), "m").ids(
            model[0], [{"role": "user", "content": "hi"}]
        )


@pytest.mark.parametrize(
    "template, expected",
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n</s>{% endfor %}", "</s>"),
        # an answer is closed by no token, but the next turn opens with one
        ("{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}{% endfor %}", "<|im_start|>"),
        # another token where the answer is the last message, as in OpenAI's harmony
        ("{% for m in messages %}{{ m.content }}{% if loop.last %}</s>{% else %}<|im_end|>{% endif %}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", None),
        ("{{ messages[0].content }}", None),
        ("{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_the_token_that_closes_an_answer(template, expected):
    tokenizer = tokenizer_of(template)
    assert Chat(tokenizer, "m").turn_end == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))


def test_ends_of_config_tokenizer_and_turn(model):
    """A chat ends with any of the three, a plain text with the first two."""
    loaded, tokenizer = model
    prompt = tokenizer("tell")["input_ids"]
    own = loaded.generation_config.eos_token_id
    try:
        loaded.generation_config.eos_token_id = [11, 12]
        assert decode.end_tokens(loaded, tokenizer) == {11, 12, tokenizer.eos_token_id}
        assert decode.Decoding(loaded, tokenizer, decode.Sampling(), 13).ends == {11, 12, 13, tokenizer.eos_token_id}
        free = decode.generate(loaded, tokenizer, prompt, decode.Sampling(max_new_tokens=12), lambda token: None).token_ids
        turn_end = next(i for i in free if i != free[0])
        decoding = decode.Decoding(loaded, tokenizer, decode.Sampling(max_new_tokens=12), turn_end)
        result = decoding.generate(prompt, lambda token: None)
        assert result.finished and result.token_ids == free[: free.index(turn_end) + 1]
    finally:
        loaded.generation_config.eos_token_id = own


def test_the_command_ends_a_chat_with_the_turn(tmp_path, quick_cli):
    """The config knows </s> alone; the template closes with <|im_end|>, which the model is made to say."""
    make_model("llama", tmp_path / "model")
    tokenizer_of(CHATML, folder=tmp_path / "model")
    options = ("--chat", "--max-new-tokens", 8, "--json")
    free = json.loads(quick_cli("generate", "model", "hi", *options).stdout)["token_ids"]
    third = free[2]
    loaded, tokenizer = qcli.load(str(tmp_path / "model"), device="cpu")
    rows = loaded.get_output_embeddings().weight.data
    rows[[third, IM_END]] = rows[[IM_END, third]]
    loaded.save_pretrained(tmp_path / "model")
    said = json.loads(quick_cli("generate", "model", "hi", *options).stdout)
    assert IM_END in said["token_ids"] and said["token_ids"].index(IM_END) == said["new_tokens"] - 1 and said["finished"]
    assert "im_end" not in said["text"]


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_message(prompt, folder, quick_cli):
    done = quick_cli("generate", folder, prompt, "--chat")
    assert done.returncode == 2 and "the message is empty" in done.stderr


def talk(folder, lines, quick_cli, monkeypatch, *options):
    """A conversation of `lines`; one that is callable is called in its turn."""
    lines = iter(lines)

    def ask(prompt):
        line = next(lines, None)
        return line() if callable(line) else line

    monkeypatch.setattr("qcli.console.ask", ask)
    return quick_cli("generate", folder, "--chat", "--max-new-tokens", 3, *options)


def prompts(done) -> list[int]:
    return [int(n) for n in re.findall(r"\[(\d+) prompt tokens", done.stderr)]


def test_the_history_grows_and_blank_lines_are_passed_over(folder, quick_cli, monkeypatch):
    done = talk(folder, ["hi", "", "  ", "yo", " /exit ", "never"], quick_cli, monkeypatch)
    first, second = prompts(done)
    assert done.returncode == 0 and first < second and "never" not in done.stderr
    assert talk(folder, [], quick_cli, monkeypatch).returncode == 0


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(folder, quick_cli, monkeypatch):
    push, heard = TextStream.push, []

    def interrupt(stream, token):
        heard.append(token)
        if len(heard) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return push(stream, token)

    monkeypatch.setattr(TextStream, "push", interrupt)
    before = signal.getsignal(signal.SIGINT)
    done = talk(folder, ["hi", "yo", "/exit"], quick_cli, monkeypatch)
    assert done.returncode == 0 and done.stderr.count("[stopped]") == 1 and len(prompts(done)) == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_while_answering_and_ctrl_c_while_typing_end_it(folder, quick_cli, monkeypatch):
    def end(*_):
        raise KeyboardInterrupt

    assert talk(folder, ["hi", end], quick_cli, monkeypatch).returncode == 130
    monkeypatch.setattr(TextStream, "push", end)  # as the command line's handler of SIGTERM does
    assert talk(folder, ["hi", "yo"], quick_cli, monkeypatch).returncode == 130


def test_a_conversation_that_outgrows_a_table_of_positions(tmp_path, quick_cli, monkeypatch):
    make_model("gpt2", tmp_path / "model")  # 64 positions
    tokenizer_of("{% for m in messages %}{{ m.content }}|{% endfor %}", folder=tmp_path / "model")
    with pytest.MonkeyPatch.context() as patched:
        warned = []
        patched.setattr("qcli.console.warn", warned.append)
        done = talk("model", ["a" * 30, "b" * 20, "c" * 25, "d" * 90, "e" * 10, "/exit"], quick_cli, monkeypatch)
    assert done.returncode == 0 and "the prompt has 91 tokens, the model's context holds 64" in done.stderr
    assert len(prompts(done)) == 4 and max(prompts(done)) < 64 and any("first turn is dropped" in w for w in warned)


def test_a_line_that_is_no_text(folder, quick_cli, monkeypatch):
    def broken():
        return b"caf\xe9".decode("utf-8")

    done = talk(folder, ["hi", broken], quick_cli, monkeypatch)
    assert done.returncode == 2 and "cannot read what was typed" in done.stderr
    done = talk(folder, ["caf\udce9", "hi", "/exit"], quick_cli, monkeypatch)
    assert done.returncode == 0 and "not valid UTF-8 at character 4" in done.stderr and len(prompts(done)) == 1


def test_an_answer_that_the_limit_cuts_off_is_called_so(folder, quick_cli, monkeypatch):
    assert "cut off" in talk(folder, ["hi", "/exit"], quick_cli, monkeypatch).stderr


def test_a_prompt_that_does_not_fit_ends_a_single_answer(model):
    with pytest.raises(UsageError, match="not valid UTF-8"):
        Chat(model[1], "m").ids(model[0], [{"role": "user", "content": "\ud800"}])
