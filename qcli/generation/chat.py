"""Turns a conversation into token ids with the model's chat template. A template is code of the model and may raise anything."""

from qcli.errors import CheckpointError
from qcli.generation.prompt import check_text, tokenized
from qcli.loading.chat_template import ChatTemplate
from qcli.loading.tokenizer import check_ids

_WORD = "marmalade"  # no template contains it, and templates that trim or quote leave it unchanged


class Chat:
    """The chat template of a tokenizer. Messages call the model `label`.

    `turn_end` is the id with which the template closes an answer, None if there is no such id. Raises CheckpointError if there
    is no template, or if it drops a user's message.
    """

    def __init__(self, tokenizer, label: str):
        self.tokenizer, self.label = tokenizer, label
        self._template = ChatTemplate(tokenizer, label, "Leave out --chat to continue the prompt as plain text.")
        self.in_parts = self._template.in_parts
        self.turn_end = self._turn_end()

    def ids(self, model, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to the point where the answer begins. A message is {"role": ..., "content": ...}."""
        for message in messages:
            check_text(message["content"])
        ids = tokenized(self.tokenizer, self._template.text(messages, answer_next=True), add_special_tokens=False)
        if not ids:
            raise CheckpointError(f"the chat template of {self.label} returns an empty text for the conversation")
        check_ids(model, self.tokenizer, ids)
        return ids

    def _turn_end(self) -> int | None:
        """The special token that follows an answer at the end of a conversation, else the one before the user's next message."""
        answered = [{"role": "user", "content": "Yes?"}, {"role": "assistant", "content": _WORD}]
        for more in ([], [{"role": "user", "content": "No."}]):
            try:
                text = self._template.text(answered + more)
            except CheckpointError:  # some templates accept no answers
                return None
            before, word, after = text.rpartition(_WORD)
            if word and after.strip():
                ids = tokenized(self.tokenizer, after.lstrip(), add_special_tokens=False)
                return ids[0] if ids and ids[0] in self._special() else None
        return None

    def _special(self) -> set[int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        return {i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
