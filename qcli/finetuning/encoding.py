"""From an example to token ids, and which of them are learnt: the text itself, the completion, or what the assistant says.

Labels are made here, as tokens are, and never from the id of padding. Whatever ends a text is learnt, so that the model learns to
stop. A prompt gets the tokens that `qcli generate` gives it, and its completion those that follow when both are read as one text.
A conversation gets the tokenizer's own template and nothing beside it, so that no text has two beginnings. Which tokens are the
assistant's is found by prefixes: the conversation up to a message must have the tokens with which the longer one begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcli.errors import CheckpointError, UsageError, first_line
from qcli.finetuning.examples import COMPLETION, MESSAGES, TEXT, Example
from qcli.generation.chat import Chat
from qcli.streaming.corpus import prefix_of

ALL, OF_COMPLETION, OF_ASSISTANT = "all", "completion", "assistant"
LOSSES = (ALL, OF_COMPLETION, OF_ASSISTANT)
_DEFAULT = {TEXT: ALL, COMPLETION: OF_COMPLETION, MESSAGES: OF_ASSISTANT}


@dataclass(frozen=True)
class Row:
    """`ids` int32 [tokens], and `trained` bool of the same shape: whether a token is learnt. The first never is, since nothing
    comes before it. `place` is where the example stands."""

    ids: np.ndarray
    trained: np.ndarray
    place: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Tokens that are learnt."""
        return int(self.trained.sum())

    def part(self, first: int, last: int) -> "Row":
        """Tokens `first` to `last` as a row of their own."""
        trained = self.trained[first:last].copy()
        trained[:1] = False
        return Row(self.ids[first:last], trained, self.place)


class Encoding:
    """Makes rows of examples of one `form`. `label` names the model in messages. `loss` is one of LOSSES or None: the form's own.

    `ends` are the ids that end a text when the model generates. `apart` counts prompts whose last token would have changed with
    the completion behind it; their completions have been read alone. `unended` counts conversations that the template closes with
    none of `ends`.
    """

    def __init__(self, tokenizer, label: str, form: str, loss: str | None, ends: Sequence[int]):
        self.tokenizer, self.label, self.form, self.loss = tokenizer, label, form, loss or _DEFAULT[form]
        if form == TEXT and self.loss != ALL:
            raise UsageError(f"loss={self.loss}: texts have no {self.loss}, expected {ALL}", "Leave it out.")
        self.ends, self.apart, self.unended = frozenset(ends), 0, 0
        self.prefix = list(prefix_of(tokenizer))
        eos = getattr(tokenizer, "eos_token_id", None)
        self.end = eos if isinstance(eos, int) else min(self.ends, default=None)
        self._chat = self._checked_template() if form == MESSAGES else None

    def row(self, example: Example) -> Row:
        """Raises UsageError or CheckpointError for what the tokenizer or its template rejects."""
        if self.form == MESSAGES:
            return self._conversation(example)
        if self.form == TEXT:
            ids = self._bare(example.text, example.place)
            return self._whole(ids, [True] * len(ids), example.place)
        prompt = self._bare(example.prompt, example.place)
        both = self._bare(example.prompt + example.text, example.place)
        if both[: len(prompt)] != prompt:
            self.apart += 1
            both = prompt + self._bare(example.text, example.place)
        trained = [self.loss == ALL] * len(prompt) + [True] * (len(both) - len(prompt))
        return self._whole(both, trained, example.place)

    def _whole(self, ids: list[int], trained: list[bool], place: str) -> Row:
        """With what the tokenizer puts before a text, unless it is there, and with the token that ends one, which is learnt."""
        count = len(self.prefix)
        if ids[:count] != self.prefix:
            ids = [*self.prefix, *ids]
            trained = [*[False] * count, *trained]
        trained[:count] = [False] * count
        if self.end is not None and ids[-1:] != [self.end]:
            ids, trained = [*ids, self.end], [*trained, True]
        return _row(ids, trained, place)

    def _conversation(self, example: Example) -> Row:
        messages = list(example.messages)
        text = self._rendered(messages, example)
        ids = self._bare(text, example.place)
        trained = [self.loss == ALL] * len(ids)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i in answers[-1:] if self.loss == OF_COMPLETION else answers if self.loss == OF_ASSISTANT else ():
            first = self._answer(ids, messages[:i], example)
            last = self._place_in(ids, self._rendered(messages[: i + 1], example), i + 1, example.place)
            last = max((at + 1 for at in range(first, last) if ids[at] in self._special), default=last)
            trained[first:last] = [True] * (last - first)
        learnt = [at for at, is_trained in enumerate(trained) if is_trained]
        if learnt and self.ends and not self.ends.intersection(ids[learnt[-1] :]):
            self.unended += 1
        return _row(ids, trained, example.place)

    def _answer(self, ids: list[int], before: list[dict], example: Example) -> int:
        """Where an answer begins: where the prompt for it ends, or where the conversation departs from that prompt."""
        least = self._place_in(ids, self._rendered(before, example), len(before), example.place) if before else 0
        prompt = self._bare(self._rendered(before, example, answer_next=True), example.place)
        return max(least, next((at for at, (a, b) in enumerate(zip(prompt, ids)) if a != b), min(len(prompt), len(ids))))

    def _place_in(self, ids: list[int], text: str, messages: int, place: str) -> int:
        """How many tokens of the conversation the text of its first messages takes."""
        start = self._bare(text, place)
        if ids[: len(start)] != start:
            raise UsageError(
                f"{place}: the chat template of {self.label} writes the first {messages} messages otherwise once others follow, so "
                "that the assistant's tokens cannot be found",
                "Keep one answer in each conversation, or learn all of it with --set loss=all.",
            )
        return len(start)

    def _rendered(self, messages: list[dict], example: Example, answer_next: bool = False) -> str:
        if self._chat.in_parts:
            messages = [
                m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in messages
            ]
        options = {"tools": list(example.tools)} if example.tools else {}
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, tokenize=False, **options)
        except Exception as e:  # Jinja's own errors, the template's, and those of its expressions
            raise UsageError(
                f"{example.place}: the chat template of {self.label} rejects the conversation: {first_line(e)}", "Mend that line."
            ) from e
        if not isinstance(text, str):
            raise CheckpointError(f"the chat template of {self.label} returns {type(text).__name__}, expected text")
        return text

    def _checked_template(self) -> Chat:
        try:
            chat = Chat(self.tokenizer, self.label)
        except CheckpointError as e:
            hint = 'Give examples as "prompt" and "completion", or a model with a chat template.'
            raise CheckpointError(e.message, hint) from e
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        self._special = {i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        return chat

    def _bare(self, text: str, place: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as e:  # tokenizers raises plain Exception, remote code raises anything
            raise UsageError(f"{place}: {type(self.tokenizer).__name__} cannot read the text: {first_line(e)}") from e


def _row(ids: list[int], trained: list[bool], place: str) -> Row:
    learnt = np.array(trained, dtype=bool)
    learnt[:1] = False
    return Row(np.array(ids, dtype=np.int32), learnt, place)
