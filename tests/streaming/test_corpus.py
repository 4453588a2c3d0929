"""Texts cut into windows: every token read once, the bytes add up, and what cannot be read is said."""

import json

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from qcli.errors import CheckpointError, UsageError
from qcli.streaming.corpus import read_windows
from tests.conftest import ROOT
from tests.models import add_tokenizer

TEXT = "Once upon a time there was a fox 😀 named Łukasz, and 漢字 in its bag.\nÜbung macht den Meister.\r\n" * 20 + " \n\n"


@pytest.fixture(scope="module")
def with_bos():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "examples/demo-model")


@pytest.fixture(scope="module")
def without_bos(tmp_path_factory):
    """A token per byte, nothing before a text."""
    folder = tmp_path_factory.mktemp("bytes")
    add_tokenizer(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


def scored_ids(corpus):
    return [i for window in corpus.windows for i in window.ids[window.context :]]


@pytest.mark.parametrize("length, stride", [(512, None), (64, None), (64, 16), (64, 63), (64, 1), (2, None), (2, 1)])
def test_with_bos_every_token_is_scored_once(with_bos, text, length, stride):
    corpus = read_windows(with_bos, text, sequence_length=length, stride=stride)
    whole = with_bos(TEXT)["input_ids"]
    assert corpus.bos and corpus.prefix == (whole[0],) == (with_bos.bos_token_id,)
    assert scored_ids(corpus) == whole[1:] and corpus.tokens == corpus.scored == len(whole) - 1
    assert corpus.scored_bytes == len(TEXT.encode())
    assert all(window.ids[0] == whole[0] and len(window.ids) <= length for window in corpus.windows)
    for window in corpus.windows[1:]:
        assert window.context == max(length - (stride or length), 1)


@pytest.mark.parametrize("length, stride", [(64, None), (64, 16), (64, 63)])
def test_windows_are_those_of_the_usual_loop(without_bos, text, length, stride):
    """The loop of transformers' guide to perplexity, which masks what an earlier window has scored."""
    ids, expected, previous = without_bos(TEXT)["input_ids"], [], 0
    for begin in range(0, len(ids), stride or length):
        end = min(begin + length, len(ids))
        if end - max(previous, begin + 1) > 0:
            expected.append((tuple(ids[begin:end]), end - begin - (end - max(previous, begin + 1))))
        previous = end
        if end == len(ids):
            break
    corpus = read_windows(without_bos, text, sequence_length=length, stride=stride)
    assert not corpus.bos
    assert [(window.ids, window.context) for window in corpus.windows] == expected


def test_a_token_is_a_byte_where_the_tokenizer_has_it_so(without_bos, tmp_path):
    path = tmp_path / "ascii.txt"
    path.write_text("abcdefghij" * 10)
    corpus = read_windows(without_bos, path, sequence_length=16)
    assert [(w.scored, w.scored_bytes) for w in corpus.windows] == [(15, 15)] * 6 + [(3, 3)]
    assert (corpus.scored, corpus.tokens, corpus.scored_bytes) == (93, 100, 93)


def test_a_last_token_that_cannot_be_scored_is_left_out(without_bos, tmp_path):
    path = tmp_path / "ascii.txt"
    path.write_text("abcdefghi")
    corpus = read_windows(without_bos, path, sequence_length=4)
    assert [len(w.ids) for w in corpus.windows] == [4, 4] and corpus.tokens == 8


def test_bytes_without_offsets_are_spread_evenly(with_bos, text, monkeypatch):
    exact = read_windows(with_bos, text, sequence_length=64)
    slow = type("Slow", (), {"is_fast": False, "__call__": lambda self, *a, **k: with_bos(*a, **k)})()
    spread = read_windows(slow, text, sequence_length=64)
    assert spread.scored_bytes == exact.scored_bytes == len(TEXT.encode())
    sizes = [w.scored_bytes for w in spread.windows]
    assert [w.ids for w in spread.windows] == [w.ids for w in exact.windows]
    assert max(sizes[:-1]) - min(sizes[:-1]) <= 1 and sizes != [w.scored_bytes for w in exact.windows]


def test_each_json_line_is_a_document(with_bos, tmp_path):
    path = tmp_path / "stories.jsonl"
    stories = ["Once upon a time.", "", "There was an otter 😀.", "a " * 90]
    path.write_text("\n\n".join(json.dumps({"text": s, "more": 1}) for s in stories) + "\n")
    corpus = read_windows(with_bos, path, sequence_length=64)
    wholes = [with_bos(s)["input_ids"] for s in stories]
    assert [list(w.ids) for w in corpus.windows[:2]] == [wholes[0], wholes[2]]
    assert corpus.documents == 3 and scored_ids(corpus) == sum((w[1:] for w in wholes), [])
    assert corpus.scored_bytes == sum(len(s.encode()) for s in stories)
    assert corpus.name == "stories.jsonl"


def test_what_closes_a_text_is_dropped(text):
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    corpus = read_windows(tokenizer, text)
    assert corpus.prefix == (1,) and all(window.ids[0] == 1 and 2 not in window.ids for window in corpus.windows)


def test_a_limit_takes_the_beginning(with_bos, text):
    whole = with_bos(TEXT)["input_ids"]
    for corpus in (
        read_windows(with_bos, text, tokens=100, sequence_length=32),
        read_windows(with_bos, text, default_tokens=100, sequence_length=32),
    ):
        assert corpus.tokens == 100 and scored_ids(corpus) == whole[1:101]
        assert corpus.scored_bytes < len(TEXT.encode())
        assert TEXT.encode()[: corpus.scored_bytes].decode() == with_bos.decode(whole[1:101]).lstrip(" ")


@pytest.mark.parametrize("limit", [2, 1000, 3000])
def test_of_a_large_text_no_more_is_tokenized_than_it_takes(with_bos, tmp_path, monkeypatch, limit):
    """The same tokens as of the whole, also where they are longer than most: here up to 40 characters."""
    text = "".join(f"{'a' * (i % 40)}{i} {TEXT[i % 90 :][:60]}" for i in range(5000)) + " " * 100_000
    whole, seen = with_bos(text, add_special_tokens=False)["input_ids"], []
    original = type(with_bos).__call__

    def count(self, text, *arguments, **options):
        seen.append(len(text))
        return original(self, text, *arguments, **options)

    monkeypatch.setattr(type(with_bos), "__call__", count)
    (tmp_path / "large.txt").write_bytes(text.encode())
    corpus = read_windows(with_bos, tmp_path / "large.txt", tokens=limit)
    assert scored_ids(corpus) == whole[:limit]
    assert sum(seen) < 100 * (limit + 256) < len(text)


def test_lengths_default_to_what_the_model_holds(with_bos, text):
    assert read_windows(with_bos, text, model_limit=512).sequence_length == 512
    assert read_windows(with_bos, text, model_limit=100_000).sequence_length == 2048
    assert read_windows(with_bos, text).stride == 2048


def test_a_long_text_is_tokenized_without_a_warning(with_bos, text, caplog):
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "examples/demo-model", model_max_length=16)
    try:
        transformers.logging.set_verbosity_warning()
        read_windows(tokenizer, text, sequence_length=16)
    finally:
        transformers.logging.set_verbosity_error()
        logger.removeHandler(caplog.handler)
    assert not caplog.records


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sequence_length": 513, "model_limit": 512}, "--sequence-length is 513, the model's context holds 512"),
        ({"sequence_length": 1}, "--sequence-length is 1, expected 2 or more"),
        ({"sequence_length": 64, "stride": 65}, "--stride is 65"),
        ({"sequence_length": 64, "stride": 0}, "--stride is 0"),
        ({"tokens": 1}, "--tokens is 1"),
        ({"tokens": 10_000_000}, "--tokens asks for 10,000,000"),
    ],
)
def test_options_out_of_range(with_bos, text, options, message):
    with pytest.raises(UsageError) as e:
        read_windows(with_bos, text, **options)
    assert message in e.value.message


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt holds 0 tokens"),
        ("a.txt", b"a", "a.txt holds 1 token,"),
        ("a.jsonl", b"\n\n", "holds 0 tokens"),
        ("a.txt", b"abc \xff", "is not UTF-8"),
        ("a.jsonl", b'{"text": "a b c"}\n{"text": \n', "line 2 is not valid JSON"),
        ("a.jsonl", b'{"text": "a b c"}\n\n["text"]\n', "line 3 has no text"),
        ("a.jsonl", b'{"content": "a b c"}\n', "line 1 has no text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text has half"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
    ],
)
def test_text_that_cannot_be_used(with_bos, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as e:
        read_windows(with_bos, tmp_path / name)
    assert message in e.value.message


@pytest.mark.parametrize("name", ["nothing.txt", "nothing.jsonl", ""])
def test_a_file_that_is_not_there(with_bos, tmp_path, name):
    with pytest.raises(UsageError, match="cannot read the text"):
        read_windows(with_bos, tmp_path / name)


TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
CHAT = [{"role": "user", "content": "Who runs?"}, {"role": "assistant", "content": "The dog runs in the park."}]


def chat_file(folder, *lines):
    path = folder / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_conversations_become_what_the_template_writes(tmp_path):
    """The template's BOS is not doubled, and the bytes are those of the text that it writes."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "examples/demo-model")
    tokenizer.chat_template = TEMPLATE
    path = chat_file(tmp_path, {"messages": CHAT}, {"messages": CHAT[:1], "id": 7})
    corpus = read_windows(tokenizer, path, sequence_length=256)
    expected = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[:1])]
    assert [window.ids for window in corpus.windows] == [
        tuple(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in expected
    ]
    assert corpus.windows[0].ids.count(tokenizer.bos_token_id) == 1 and corpus.documents == 2
    assert corpus.scored_bytes == sum(len(text.removeprefix(tokenizer.bos_token).encode()) for text in expected)


def test_a_template_that_wants_parts_gets_them(without_bos, tmp_path):
    without_bos.chat_template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}|{% endfor %}{% endfor %}"
    try:
        corpus = read_windows(without_bos, chat_file(tmp_path, {"messages": CHAT}), sequence_length=64)
    finally:
        without_bos.chat_template = None
    assert without_bos.decode(corpus.windows[0].ids) == "Who runs?|The dog runs in the park.|"


@pytest.mark.parametrize(
    "template, lines, message",
    [
        (None, [{"messages": CHAT}], "has no chat template"),
        ("{{ raise_exception('Odd roles.') }}", [{"messages": CHAT}], "chat template of .* rejects the conversation: Odd roles"),
        (TEMPLATE, [{"messages": CHAT}, {"text": "a b c"}], 'line 2 has "text", and .*line 1 has "messages"'),
        (TEMPLATE, [{"text": "a b c"}, {"messages": CHAT}], 'line 2 has "messages", and .*line 1 has "text"'),
        (TEMPLATE, [{"messages": []}], "line 1: its messages are no conversation"),
        (TEMPLATE, [{"messages": CHAT}, {"messages": [{"content": "x"}]}], "line 2: its messages are no conversation"),
        (TEMPLATE, [{"messages": "hello"}], "line 1: its messages are no conversation"),
        (TEMPLATE + "{{ messages[1].role + 1 }}", [{"messages": CHAT[:1]}], "rejects the conversation"),
        (
            "{% if messages|length > 1 %}{{ raise_exception('too many') }}{% endif %}" + TEMPLATE,
            [{"messages": CHAT[:1]}, {"messages": CHAT}],
            "line 2: the chat template of .* rejects the conversation: too many",
        ),
    ],
)
def test_conversations_that_do_not_do(template, lines, message, without_bos, tmp_path):
    without_bos.chat_template = template
    try:
        with pytest.raises((UsageError, CheckpointError), match=message):
            read_windows(without_bos, chat_file(tmp_path, *lines), sequence_length=64)
    finally:
        without_bos.chat_template = None
