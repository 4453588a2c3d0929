"""From a line of a .jsonl file to a document: its text, or its conversation as the model's chat template writes it."""

from typing import Any

from qcli.errors import CheckpointError, UsageError
from qcli.loading.chat_template import ChatTemplate

TEXT, MESSAGES = "text", "messages"


class Conversations:
    """The documents of one file, all of one `kind`, which the first line decides. None before."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.kind: str | None = None
        self._template: ChatTemplate | None = None
        self._first = ""

    def document(self, value: Any, place: str) -> str:
        """The document of a line's JSON value; `place` is the line, in words. Raises UsageError for a line without any, and for one
        of another kind than the first; CheckpointError without a chat template."""
        kind = _kind(value)
        if kind is None:
            raise UsageError(
                f'{place} has no text, expected an object such as {{"text": "..."}} or {{"messages": [...]}}', "Mend that line."
            )
        if self.kind is None:
            self.kind, self._first = kind, place
        if kind != self.kind:
            raise UsageError(
                f'{place} has "{kind}", and {self._first} has "{self.kind}", expected one kind in a file', "Divide the file."
            )
        return value[TEXT] if kind == TEXT else self._conversation(value[MESSAGES], place)

    def _conversation(self, messages: Any, place: str) -> str:
        fits = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
        if not fits or not all(isinstance(m.get("role"), str) and "content" in m for m in messages):
            raise UsageError(
                f'{place}: its messages are no conversation, expected a list such as [{{"role": "user", "content": "..."}}]',
                "Mend that line.",
            )
        if self._template is None:
            label = getattr(self.tokenizer, "name_or_path", "") or "the model"
            self._template = ChatTemplate(self.tokenizer, label, 'Give documents as "text", or a model with a chat template.')
        try:
            return self._template.text(messages)
        except CheckpointError as e:
            raise UsageError(f"{place}: {e.message}", "Mend that line.") from e


def _kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    if isinstance(value.get(TEXT), str):
        return TEXT
    return MESSAGES if MESSAGES in value else None
