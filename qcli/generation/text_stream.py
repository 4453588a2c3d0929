"""Text of token ids as they come, for the screen."""


class TextStream:
    """Turns token ids into text one by one: whole characters only, with the tokenizer's own spaces.

    The text of an id depends on its neighbours. Each step therefore decodes a short tail twice, with and without the new ids.
    The difference is the new text; it is held back while it ends in half a character.
    """

    CONTEXT = 6  # earlier ids that the decoded text may depend on

    def __init__(self, tokenizer, prompt_ids: list[int]):
        self.tokenizer = tokenizer
        self.ids = list(prompt_ids[-self.CONTEXT :])
        self.start, self.shown = 0, len(self.ids)

    def push(self, token: int) -> str:
        """The text that `token` completes, possibly none."""
        self.ids.append(token)
        before, now = self._decode(self.ids[self.start : self.shown]), self._decode(self.ids[self.start :])
        if now.endswith("\N{REPLACEMENT CHARACTER}") or len(now) <= len(before):
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return now[len(before) :]

    def flush(self) -> str:
        """The remaining text, half characters included."""
        before, now = self._decode(self.ids[self.start : self.shown]), self._decode(self.ids[self.start :])
        self.shown = len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
