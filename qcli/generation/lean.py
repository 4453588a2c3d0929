"""Decoding on a CPU by the lean step (lean_step.py): a program makes one token after the other. transformers reads long prompts.

The program is made for a model before its first prompt, and compared with transformers: each layer, the input of the first one, and
the head, on the last of some random tokens, with the keys and values that transformers has stored. A model that differs anywhere
keeps transformers' step. QCLI_STEP=transformers turns the lean step off.
"""

import os
from collections.abc import Callable
from itertools import takewhile

import torch
from transformers.generation.configuration_utils import GenerationMode

from qcli.errors import UsageError
from qcli.generation.drafts import Draft
from qcli.generation.lean_step import MOST_TOKENS, Caches, LeanStep, run_layer
from qcli.generation.linears import linear_of
from qcli.generation.recognized import Recognized
from qcli.generation.step import Unsupported
from qcli.runtime import cpu

CHOICE = "QCLI_STEP"
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
_BY_STEPS = 2 * MOST_TOKENS  # tokens of a prompt that the step reads sooner than transformers
ROOM = 256  # positions of a cache at first, beyond the prompt; doubled when they are full


def wanted(model) -> bool:
    """Whether the lean step may run `model`: on the CPU as a whole, with its kernels. Raises UsageError for a choice of neither."""
    choice = os.environ.get(CHOICE) or "lean"
    if choice not in ("lean", "transformers"):
        raise UsageError(f"the environment variable {CHOICE} is {choice!r}", "Set it to lean or transformers, or unset it.")
    if choice != "lean" or cpu.variant() is None or model.training:
        return False
    return all(tensor.device.type == "cpu" for tensor in (*model.parameters(), *model.buffers()))


class Lean(Recognized):
    """The lean step of one model, for one text after the other.

    With `kv_int8` the cache holds int8 with a scale for each key and value of a head: half the memory of 16 bits.
    """

    def __init__(self, model, kv_int8: bool = False):
        super().__init__(model, linear_of)
        self.kv_dtype = torch.int8 if kv_int8 else self.dtype
        # Whether tokens of a step share a choice, so that guesses would change their logits.
        self.mixes = any(module.rounds_few for module in self.rounding)
        self.step: LeanStep | None = None
        self.refused = False  # whether the step was compared and differs
        self.text: list[int] = []  # whose keys and values the cache holds
        self.written = 0  # positions that the cache was written at, those of guesses that were not kept among them
        self.kept = 0  # tokens of the last prompt that were not read, because the cache held them

    def prepare(self) -> None:
        """Makes the step, at the first call, and compares it with transformers on a text of random tokens.

        On a user's prompt equal tokens would hide differences, and a long one would be read twice if the readings were wrong.
        Raises Unsupported if no reading agrees.
        """
        if self.step is not None:
            return
        if self.refused:
            raise Unsupported
        try:
            self.step = self._compared()
        except Unsupported:
            self.refused = True
            raise

    def _compared(self) -> LeanStep:
        """A step that computes what transformers does. Raises Unsupported."""
        text = self.random_text()
        caches = self.caches(text.shape[1], self.dtype)
        try:
            with self.watching() as seen:
                logits = self.read(text, caches)
            blocks = self.agreeing(seen, text, caches, run_layer)
            step = LeanStep(self.embed, blocks, self.last_norm(), self.head, self.tables(caches.length), caches)
            ours = self.finished(step.run_head(seen.outputs[-1][0, -1:].float()))
        except (AttributeError, LookupError, TypeError, ValueError) as e:  # layers that are called in another way
            raise Unsupported from e
        if not self.tolerance.agree(ours, logits):
            raise Unsupported
        return step

    def prefill(self, ids: torch.Tensor, length: int) -> torch.Tensor:
        """Reads ids int64 [1, tokens]. Returns logits float32 [1, vocabulary] after the last.

        transformers reads them, or the step itself where few are new to the cache, as in a conversation. `length` is that of the
        longest text. Raises Unsupported as `prepare`.
        """
        self.prepare()
        count = ids.shape[1]
        room = max(min(length, count + ROOM), MOST_TOKENS)
        self.length = max(length, MOST_TOKENS)
        self.kept = self._kept(ids[0].tolist())
        new = count - self.kept
        by_steps = not self.mixes and (new <= _BY_STEPS or 2 * new <= count)
        if not self.text or (not by_steps and self.step.caches.length < count):
            self.text, self.written = [], 0
            self.step.record(self.caches(room, self.kv_dtype), self.tables(room))
        if not by_steps:
            self.kept = 0
            return self._read(ids, self.step.caches)
        for start in range(self.kept, count, MOST_TOKENS):
            logits = self.run(ids[0, start : start + MOST_TOKENS], start)
        return logits[-1:]

    def _kept(self, text: list[int]) -> int:
        """How many tokens at the beginning of `text` the cache holds; at least the last token is to be read."""
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, self.text)))
        same = min(same, len(text) - 1)
        caches = self.step.caches
        wrapped = any(window and layer.capacity < self.written for window, layer in zip(caches.windows, caches.layers))
        # In a full window positions beyond these have taken the slots of earlier ones, which the next token would read.
        return 0 if wrapped and self.written > same + MOST_TOKENS else same

    def run(self, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Logits float32 [tokens, vocabulary] after each of ids int64 [tokens], whose first has the position `start`."""
        caches = self.step.caches
        if start + len(ids) > caches.length:
            length = max(start + len(ids), min(2 * caches.length, self.length))
            self.step.record(caches.stretched(length, start), self.tables(length))
        del self.text[start:]
        self.written = max(self.written if start else 0, start + len(ids))  # said before it is so: a step may be interrupted
        logits = self.step.run(ids, start)
        self.text += ids.tolist()
        return self.finished(logits)

    def cache_bytes(self, tokens: float) -> float:
        """Bytes of keys and values that a token reads after `tokens` others."""
        caches = self.step.caches
        seen = [min(tokens, window or tokens) for window in caches.windows]
        return sum(count * sum(x[:, 0].nbytes for x in layer.tensors) for count, layer in zip(seen, caches.layers))

    def _read(self, ids: torch.Tensor, caches: Caches) -> torch.Tensor:
        self.text, self.written = [], 0
        logits = self.read(ids, caches)
        self.text, self.written = ids[0].tolist(), ids.shape[1]
        return logits


def generate(
    model,
    ids: torch.Tensor,
    lean: Lean,
    on_token: Callable[[int], object],
    ready: Callable[[], None],
    draft: Draft | None = None,
    **options,
) -> int:
    """Continues ids int64 [1, tokens] by transformers' rules for `options`, arguments of its `generate`.

    `on_token` is called with each new id, `ready` when the step is made and before the prompt is read. Raises Unsupported before
    the first call of `on_token`. Returns the number of steps after the prompt.
    """
    steps = 0

    def decode(_, input_ids, *, logits_processor, stopping_criteria, generation_config, **_inputs):
        nonlocal steps
        if generation_config.get_generation_mode() not in _MODES or len(input_ids) != 1 or generation_config.use_cache is False:
            raise Unsupported
        length, text = generation_config.max_length, input_ids[0].tolist()
        lean.prepare()
        if draft is not None:
            draft.prepare()
        ready()
        logits = lean.prefill(input_ids, length)
        guessing = draft is not None and draft.begin(text, length)
        guessed: list[int] = []
        while True:
            kept = 0
            for row in logits.split(1):
                scores = logits_processor(input_ids, row)
                if generation_config.do_sample:
                    token = torch.multinomial(scores.softmax(-1), 1)
                else:
                    token = scores.argmax(-1, keepdim=True)
                input_ids = torch.cat((input_ids, token), 1)
                text.append(int(token))
                on_token(text[-1])
                if bool(stopping_criteria(input_ids, scores).all()):
                    return input_ids
                if kept == len(guessed) or text[-1] != guessed[kept]:
                    break
                kept += 1
            if guessing:
                draft.hear(len(guessed), kept)
                # The model's own choice ends a text that has room for one more token.
                guessed = draft.guess(text, min(MOST_TOKENS, length - len(text)) - 1)
                guessed = list(takewhile(lambda token: token < lean.vocabulary, guessed))
            steps += 1
            logits = lean.run(torch.tensor([text[-1], *guessed]), len(text) - 1)

    model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decode, **options)
    return steps
