"""Examples to learn from, as they stand in files: a text, a prompt with its completion, or a conversation.

The keys of a line say which. A file holds one form, and so does a folder.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcli.errors import UsageError

TEXT, COMPLETION, MESSAGES = "text", "completion", "messages"
_SUFFIXES = (".jsonl", ".txt")
_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Example:
    """One example and where it stands. `form` is TEXT, COMPLETION or MESSAGES. `text` is the text, or the completion of `prompt`.
    `messages` and `tools` are as chat templates take them."""

    form: str
    place: str
    text: str = ""
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None


def files_of(data: str | Path) -> tuple[Path, Path | None]:
    """(the file to train on, the file that is held out or None): `data` itself, or of a folder its train and valid files, .jsonl
    or .txt. Raises UsageError."""
    path = Path(data)
    if not path.is_dir():
        if not path.exists():
            raise UsageError(f"there is no {path}", "Give a .jsonl or .txt file, or a folder with train.jsonl.")
        if path.suffix not in _SUFFIXES:
            raise UsageError(f"{path} is no .jsonl or .txt file", "Convert it: a JSON object in each line.")
        return path, None
    train, valid = (_one(path, stem) for stem in ("train", "valid"))
    if train is None:
        raise UsageError(f"{path} has no train.jsonl and no train.txt", "Name the file to train on so, or give it alone.")
    return train, valid


def _one(folder: Path, stem: str) -> Path | None:
    found = [folder / f"{stem}{suffix}" for suffix in _SUFFIXES if (folder / f"{stem}{suffix}").exists()]
    if len(found) > 1:
        raise UsageError(f"{folder} has both {found[0].name} and {found[1].name}", "Remove one of them.")
    return found[0] if found else None


def read_examples(path: Path) -> list[Example]:
    """The examples of a file: a .txt file is one text, a .jsonl file has an example in each line. Raises UsageError, which names
    the line."""
    try:
        found = [_text_file(path)] if path.suffix == ".txt" else list(_lines(path))
    except OSError as e:
        raise UsageError(f"cannot read {path}: {e.strerror}") from e
    if not found or all(not (e.text.strip() or e.messages) for e in found):
        raise UsageError(f"{path} holds no example", 'Write a line for each, such as {"prompt": "...", "completion": "..."}.')
    forms = {example.form: example for example in reversed(found)}
    if len(forms) > 1:
        first, other = sorted(forms.values(), key=lambda example: found.index(example))[:2]
        raise UsageError(f"{other.place} is {_called(other.form)}, {first.place} is {_called(first.form)}", "Keep to one form.")
    return found


def _called(form: str) -> str:
    return {TEXT: "a text", COMPLETION: "a prompt with a completion", MESSAGES: "a conversation"}[form]


def _text_file(path: Path) -> Example:
    try:
        return Example(TEXT, str(path), text=path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8: {e}", "Convert it first.") from None


def _lines(path: Path) -> Iterator[Example]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _example(f"{path}, line {number}", line)


def _example(place: str, line: bytes) -> Example:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise UsageError(f"{place} is not UTF-8: {e}", "Convert it first.") from None
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{place} is not valid JSON: {e}", "Mend that line.") from None
    if not isinstance(value, dict):
        raise _unlike(place, f"is {type(value).__name__}")
    forms = [keys for keys in (("text",), ("prompt", "completion"), ("messages",)) if all(key in value for key in keys)]
    if not forms:
        raise _unlike(place, f"has the keys {', '.join(map(repr, value)) or 'of an empty object'}")
    if len(forms) > 1:
        raise UsageError(f"{place} has both {forms[0][0]!r} and {forms[1][0]!r}", "Keep one form of the example.")
    if forms[0] == ("messages",):
        return Example(MESSAGES, place, messages=_messages(place, value["messages"]), tools=_tools(place, value.get("tools")))
    if forms[0] == ("text",):
        return Example(TEXT, place, text=_string(place, "text", value["text"]))
    prompt, completion = (_string(place, key, value[key]) for key in forms[0])
    return Example(COMPLETION, place, text=completion, prompt=prompt)


def _unlike(place: str, found: str) -> UsageError:
    return UsageError(f'{place} {found}, expected "text", "prompt" and "completion", or "messages"', "Mend that line.")


def _string(place: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{place}: {key!r} is {type(value).__name__}, expected a string", "Mend that line.")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise UsageError(f"{place}: {key!r} has half a surrogate pair", "Mend that line.")
    return value


def _messages(place: str, value: object) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(f"{place}: 'messages' is {_shown(value)}, expected a list of messages", "Mend that line.")
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise UsageError(f"{place}: message {i} has no role, expected one of {', '.join(_ROLES)}", "Mend that line.")
        content = message.get("content")
        if content is None and (message.get("tool_calls") or message["role"] != "assistant"):
            content = ""
        if isinstance(content, str):
            _string(place, "content", content)
        elif not isinstance(content, list):
            raise UsageError(f"{place}: message {i} has no 'content', expected a text", "Mend that line.")
    if not any(message["role"] == "assistant" for message in value):
        raise UsageError(f"{place} has no message of the assistant to learn", "Add its answer.")
    return tuple(value)


def _tools(place: str, value: object) -> tuple[dict[str, Any], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UsageError(f"{place}: 'tools' is {_shown(value)}, expected a list of objects", "Mend that line.")
    return tuple(value)


def _shown(value: object) -> str:
    return "an empty list" if value == [] else type(value).__name__
