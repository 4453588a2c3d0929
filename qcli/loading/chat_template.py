"""The chat template of a tokenizer: from messages to text. A template is code of the model and may raise anything."""

from typing import Any

from qcli.errors import CheckpointError, first_line

_WORD = "marmalade"  # no template contains it, and templates that trim or quote leave it unchanged


class ChatTemplate:
    """Messages about it call the model `label`, and end with `hint`, what to do without it.

    `in_parts` says whether a message's content must be a list of parts. Raises CheckpointError if there is no template, or if it
    drops a user's message.
    """

    def __init__(self, tokenizer, label: str, hint: str):
        self.tokenizer, self.label, self.hint = tokenizer, label, hint
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise CheckpointError(f"{label} has no chat template", hint)
        if isinstance(template, dict) and "default" not in template:
            names = ", ".join(sorted(map(str, template)))
            raise CheckpointError(f"{label} has no default among its chat templates: {names}", hint)
        self.in_parts = False
        self.in_parts = self._wants_parts()

    def text(self, messages: list[dict[str, Any]], answer_next: bool = False) -> str:
        """The text of a conversation; with `answer_next` up to where the model's answer begins. Raises CheckpointError for one that
        the template rejects."""
        if self.in_parts:
            messages = [
                m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in messages
            ]
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, tokenize=False)
        except Exception as e:  # Jinja's own errors, the template's, and those of its expressions
            raise CheckpointError(f"the chat template of {self.label} rejects the conversation: {first_line(e)}", self.hint) from e
        if not isinstance(text, str):
            raise CheckpointError(f"the chat template of {self.label} returns {type(text).__name__}, expected text")
        return text

    def _wants_parts(self) -> bool:
        """Whether the template drops or rejects a plain text, and takes parts."""
        messages, refusal = [{"role": "user", "content": _WORD}], None
        for self.in_parts in (False, True):
            try:
                if _WORD in self.text(messages, answer_next=True).lower():
                    return self.in_parts
            except CheckpointError as e:
                refusal = refusal or e
        raise refusal or CheckpointError(f"the chat template of {self.label} drops the user's message", self.hint)
