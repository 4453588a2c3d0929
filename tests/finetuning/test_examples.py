"""What a file of examples may hold, and how it is refused."""

import json

import pytest

from qcli.errors import UsageError
from qcli.finetuning.examples import COMPLETION, MESSAGES, TEXT, files_of, read_examples

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
LINES = {
    TEXT: {"text": "a"},
    COMPLETION: {"prompt": "a", "completion": "b"},
    MESSAGES: {"messages": [USER, ASSISTANT], "tools": [{"name": "f"}]},
}


def lines(tmp_path, *values, name="train.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"\n".join(v if isinstance(v, bytes) else json.dumps(v).encode() for v in values))
    return path


@pytest.mark.parametrize("form", LINES)
def test_the_keys_say_the_form(tmp_path, form):
    found = read_examples(lines(tmp_path, LINES[form], b"", LINES[form]))
    assert [example.form for example in found] == [form, form]
    assert found[1].place.endswith("line 3")


def test_other_keys_beside_them_are_passed_over(tmp_path):
    (found,) = read_examples(lines(tmp_path, LINES[COMPLETION] | {"id": 3}))
    assert (found.prompt, found.text) == ("a", "b")


def test_a_text_file_is_one_text(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes("\ufeffÄ\n\nb".encode())
    (found,) = read_examples(path)
    assert found.text == "Ä\n\nb"


@pytest.mark.parametrize(
    "values, words",
    [
        ([{"text": "a"}, b"{"], "line 2 is not valid JSON"),
        ([{"text": "a"}, b'{"text": "\xff"}'], "line 2 is not UTF-8"),
        ([[1]], "line 1 is list"),
        ([{"question": "a"}], "has the keys 'question', expected"),
        ([{}], "of an empty object"),
        ([{"text": 1}], "'text' is int, expected a string"),
        ([{"text": "\ud800"}], "half a surrogate pair"),
        ([{"prompt": "a"}], "has the keys 'prompt', expected"),
        ([{"text": "a", "messages": [USER]}], "has both 'text' and 'messages'"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "line 2 is a prompt with a completion, .*line 1 is a text"),
        ([{"messages": []}], "'messages' is an empty list"),
        ([{"messages": [USER]}], "no message of the assistant"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "message 1 has no role"),
        ([{"messages": [USER, {"role": "assistant"}]}], "message 2 has no 'content'"),
        ([{"messages": [USER, ASSISTANT], "tools": {}}], "'tools' is dict"),
        ([], "holds no example"),
        ([{"text": "  "}], "holds no example"),
    ],
)
def test_what_is_no_example_is_named(tmp_path, values, words):
    with pytest.raises(UsageError, match=words):
        read_examples(lines(tmp_path, *values))


def test_a_folder_has_train_and_valid_files(tmp_path):
    with pytest.raises(UsageError, match=r"has no train\.jsonl"):
        files_of(tmp_path)
    train = lines(tmp_path, LINES[TEXT])
    assert files_of(tmp_path) == (train, None)
    valid = lines(tmp_path, LINES[TEXT], name="valid.jsonl")
    assert files_of(tmp_path) == (train, valid)
    (tmp_path / "train.txt").write_text("a")
    with pytest.raises(UsageError, match=r"both train\.jsonl and train\.txt"):
        files_of(tmp_path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="there is no"):
        files_of(tmp_path / "absent.jsonl")
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"no \.jsonl or \.txt file"):
        files_of(tmp_path / "data.csv")
