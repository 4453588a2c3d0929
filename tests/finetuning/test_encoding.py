"""Which tokens are learnt: a table for each form, written by hand."""

import json
from fractions import Fraction
from itertools import groupby

import pytest

from qcli.errors import CheckpointError, UsageError
from qcli.finetuning.encoding import Encoding
from qcli.finetuning.examples import COMPLETION, MESSAGES, TEXT, Example
from qcli.finetuning.rows import read_rows
from tests.generation.test_chat import CHATML, PARTS, tokenizer_of

ENDS = (253, 255)
LAST_ONLY = (  # as templates do that show the thoughts of the last answer alone
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<s>{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
U1, A1, U2, A2 = (
    {"role": role, "content": content}
    for role, content in (("user", "hi"), ("assistant", "ho"), ("user", "he"), ("assistant", "hu"))
)
TOOLS = ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def encoding(form, loss=None, template=CHATML, ends=ENDS, **options):
    return Encoding(tokenizer_of(template, **options), "m", form, loss, ends)


def shown(made, example):
    """The row as text, with what is learnt in brackets."""
    row, tokens = made.row(example), made.tokenizer.convert_ids_to_tokens
    parts = [
        (learnt, tokens([i for i, _ in group])) for learnt, group in groupby(zip(row.ids.tolist(), row.trained), lambda p: p[1])
    ]
    text = "".join(f"[{''.join(part)}]" if learnt else "".join(part) for learnt, part in parts)
    return text.replace("\u010a", "\n").replace("\u0120", " ")


@pytest.mark.parametrize(
    "form, loss, example, expected",
    [
        (TEXT, None, Example(TEXT, "", text="abc"), "a[bc</s>]"),
        (COMPLETION, None, Example(COMPLETION, "", prompt="ab", text=" c"), "ab[ c</s>]"),
        (COMPLETION, "all", Example(COMPLETION, "", prompt="ab", text=" c"), "a[b c</s>]"),
        (COMPLETION, None, Example(COMPLETION, "", prompt="ab", text=" c</s>"), "ab[ c</s>]"),
        (COMPLETION, None, Example(COMPLETION, "", prompt="ab", text=""), "ab[</s>]"),
        (COMPLETION, None, Example(COMPLETION, "", prompt="", text="ab"), "a[b</s>]"),
        (
            MESSAGES,
            None,
            Example(MESSAGES, "", messages=(U1, A1, U2, A2)),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[ho<|im_end|>]\n"
            "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n[hu<|im_end|>]\n",
        ),
        (
            MESSAGES,
            "completion",
            Example(MESSAGES, "", messages=(U1, A1, U2, A2)),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n"
            "<|im_start|>user\nhe<|im_end|>\n<|im_start|>assistant\n[hu<|im_end|>]\n",
        ),
        (
            MESSAGES,
            "all",
            Example(MESSAGES, "", messages=(U1, A1)),
            "<|im_start|>[user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>\n]",
        ),
        (
            MESSAGES,
            None,
            Example(MESSAGES, "", messages=(U1, A1, U2)),
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[ho<|im_end|>]\n<|im_start|>user\nhe<|im_end|>\n",
        ),
    ],
)
def test_what_is_learnt(form, loss, example, expected):
    assert shown(encoding(form, loss), example) == expected


def test_messages_in_parts_go_through_their_template():
    assert shown(encoding(MESSAGES, template=PARTS), Example(MESSAGES, "", messages=(U1, A1))) == "hi<|im_end|>[ho<|im_end|>]"


def test_tools_reach_the_template():
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML
    assert shown(encoding(MESSAGES, template=template), Example(MESSAGES, "", messages=(U1, A1), tools=TOOLS)).startswith(
        "f<|im_start|>"
    )


def test_a_beginning_of_text_comes_once():
    made = encoding(COMPLETION)
    made.tokenizer._tokenizer.post_processor = _begin()
    made = Encoding(made.tokenizer, "m", COMPLETION, None, ENDS)
    assert shown(made, Example(COMPLETION, "", prompt="ab", text="c")) == "<s>ab[c</s>]"
    assert shown(Encoding(made.tokenizer, "m", TEXT, None, ENDS), Example(TEXT, "", text="c")) == "<s>[c</s>]"
    assert shown(made, Example(COMPLETION, "", prompt="<s>ab", text="c")) == "<s>ab[c</s>]"
    assert shown(Encoding(made.tokenizer, "m", TEXT, None, ENDS), Example(TEXT, "", text="<s>c")) == "<s>[c</s>]"
    chat = Encoding(made.tokenizer, "m", MESSAGES, None, ENDS)
    assert "<s>" not in shown(chat, Example(MESSAGES, "", messages=(U1, A1)))


def _begin():
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 252)])


def test_a_token_that_would_join_prompt_and_completion_is_divided():
    """As `qcli generate` will read the prompt; the row is counted."""
    from tokenizers import Tokenizer, models

    made = encoding(COMPLETION)
    vocabulary = {"a": 0, "b": 1, "ab": 2, "<s>": 252, "</s>": 253}
    joined = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")], unk_token="a"))
    made.tokenizer._tokenizer = joined
    row = made.row(Example(COMPLETION, "", prompt="a", text="b"))
    assert row.ids.tolist()[:2] == [0, 1] and made.apart == 1
    assert row.trained.tolist()[:2] == [False, True]


def test_a_template_that_rewrites_earlier_answers_is_refused():
    made = encoding(MESSAGES, template=LAST_ONLY)
    assert shown(made, Example(MESSAGES, "p", messages=(U1, A1))).endswith("assistant\n[<s>ho<|im_end|>]\n")
    with pytest.raises(UsageError, match="p: the chat template of m writes the first 2 messages otherwise"):
        made.row(Example(MESSAGES, "p", messages=(U1, A1, U2, A2)))


def test_templates_that_cannot_be_used():
    with pytest.raises(CheckpointError, match="m has no chat template"):
        encoding(MESSAGES, template=None)
    refuses = "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}"
    with pytest.raises(UsageError, match="p: the chat template of m rejects the conversation: one only"):
        encoding(MESSAGES, template=refuses).row(Example(MESSAGES, "p", messages=(U1, A1)))
    with pytest.raises(UsageError, match="texts have no completion"):
        encoding(TEXT, "completion")


def test_an_end_that_generation_does_not_know_is_counted():
    made = encoding(MESSAGES, ends=(1,))
    made.row(Example(MESSAGES, "", messages=(U1, A1)))
    assert made.unended == 1


def rows_of(tmp_path, texts, form=COMPLETION, **options):
    path = tmp_path / "train.jsonl"
    line = {COMPLETION: lambda t: {"prompt": "p", "completion": t}, TEXT: lambda t: {"text": t}}[form]
    path.write_text("".join(json.dumps(line(text)) + "\n" for text in texts))
    settings = {"held_out": Fraction(0), "max_tokens": 6, "too_long": None, "loss": None, "ends": ENDS, "seed": 0}
    return read_rows(tokenizer_of(CHATML), "m", path, **settings | options)


def test_long_rows_are_an_error_unless_something_is_chosen(tmp_path):
    texts = ["abc", "abcdefgh", "abcdefghi"]
    with pytest.raises(UsageError, match=r"line 2 \(10 tokens\) and 1 more are longer than --max-tokens, which is 6") as refused:
        rows_of(tmp_path, texts)
    assert "The longest has 11" in refused.value.hint
    cut = rows_of(tmp_path, texts, too_long="cut")
    assert [len(row) for row in cut.train] == [5, 6, 6] and (cut.counts.cut, cut.counts.lost_tokens) == (2, 9)
    dropped = rows_of(tmp_path, texts, too_long="drop")
    assert [len(row) for row in dropped.train] == [5] and len(dropped.counts.dropped) == 2
    split = rows_of(tmp_path, texts, too_long="split")
    assert [len(row) for row in split.train] == [5, 6, 4, 6, 5] and split.counts.split == 2
    assert sum(row.count for row in split.train) == 4 + 8 + 1 - 1 + 9 + 1 - 1  # the first of a piece has nothing before it


def test_texts_are_split(tmp_path):
    found = rows_of(tmp_path, ["abcdefgh"], TEXT)
    assert tokenizer_of().decode([i for row in found.train for i in row.ids]) == "abcdefgh</s>"
    assert [len(row) for row in found.train] == [6, 3] and found.trained == 5 + 2


def test_rows_without_a_token_to_learn_are_named(tmp_path):
    found = rows_of(tmp_path, ["abc", "abcdefgh"], too_long="cut", max_tokens=6)
    assert not found.counts.dropped
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "pppppppp", "completion": "a"}) + "\n" + json.dumps({"prompt": "p", "completion": "a"}))
    options = {"held_out": Fraction(0), "max_tokens": 6, "too_long": "cut", "loss": None, "ends": ENDS, "seed": 0}
    found = read_rows(tokenizer_of(CHATML), "m", path, **options)
    assert len(found.train) == 1 and found.counts.dropped == [f"{path}, line 1: no token to learn within 6 tokens"]
    path.write_text(json.dumps({"prompt": "pppppppp", "completion": "a"}))
    with pytest.raises(UsageError, match="has no token to learn"):
        read_rows(tokenizer_of(CHATML), "m", path, **options)


@pytest.mark.parametrize(
    "count, share, held_out", [(1, None, 0), (7, None, 0), (8, None, 1), (40, None, 2), (40, 0, 0), (4, 0.5, 2)]
)
def test_a_share_is_held_out(tmp_path, count, share, held_out):
    found = rows_of(tmp_path, [chr(97 + i % 26) for i in range(count)], held_out=None if share is None else Fraction(str(share)))
    assert (len(found.train), len(found.held_out)) == (count - held_out, held_out)
