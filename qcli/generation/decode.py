"""Token by token through a model: prefill, then one token at a time. Prints nothing.

On CUDA the step of a token is captured (decode_graph.py) where that can be. Elsewhere the loop is transformers' `generate`,
over the model's own cache; rules of sampling are its own everywhere.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList

from qcli.devices import gpus_of
from qcli.errors import CheckpointError, QcliError, QcliWarning, UsageError, first_line
from qcli.generation import graph as decode_graph
from qcli.generation import positions
from qcli.generation.can_generate import check_class
from qcli.generation.sampling import Sampling
from qcli.generation.stop_string import stop_string
from qcli.loading import generation_config, out_of_memory
from qcli.loading.load import quiet

DEFAULT_NEW_TOKENS = 128
# What transformers and models of others raise where they cannot go on.
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class Generation:
    """The new token ids and what they took. The first one comes out of the prefill."""

    token_ids: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finished: bool  # by an end token or a stop string, not by the limit
    capture_seconds: float | None = None  # what capturing the step took, before the prefill; None where it was not

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first; None where there was but one."""
        count = len(self.token_ids) - 1
        return count / max(self.decode_seconds, 1e-9) if count > 0 else None


class _Streamer:
    """Notes each token and when it came. transformers calls `put` with the prompt first and then with each token."""

    def __init__(self, on_token: Callable[[int], None], ends: set[int]):
        self.on_token, self.ends, self.prompt_is_next = on_token, ends, True
        self.token_ids: list[int] = []
        self.started = time.monotonic()
        self.first_at = self.last_at = self.captured_at = self.refused = None

    def ready(self) -> None:
        """Called when a step is captured; the prefill follows."""
        self.captured_at = time.monotonic()

    def hear(self, token: int) -> bool:
        """Notes a token; whether it ends the text."""
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        self.token_ids.append(token)
        try:
            self.on_token(token)
        except Exception as e:
            self.refused = e
            raise
        return token in self.ends

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        for token in value.reshape(-1).tolist():
            self.hear(token)

    def end(self) -> None:
        """Called after the last token."""


def end_tokens(model, tokenizer, turn_end: int | None = None) -> set[int]:
    """Every id that ends a text: the generation config's one or many, the tokenizer's, and in a chat `turn_end`."""
    stated = model.generation_config.eos_token_id
    stated = list(stated) if isinstance(stated, (list, tuple)) else [stated]
    return {i for i in (*stated, tokenizer.eos_token_id, turn_end) if i is not None}


class Decoding:
    """Texts out of a model by one set of rules: its generation config, checked and cleared, and over it what the user asked.

    `ends` are the ids that end a text. Warns (QcliWarning) of each field that is overridden, once. Raises CheckpointError for
    a field whose value cannot be followed.
    """

    def __init__(self, model, tokenizer, sampling: Sampling, turn_end: int | None = None):
        check_class(type(model), type(model).__name__)
        self.model, self.sampling = model, sampling
        self.vocabulary = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
        own = model.generation_config
        generation_config.check(
            {name: getattr(own, name, None) for name in generation_config.FIELDS},
            f"the generation config of {type(model).__name__}",
            self.vocabulary,
        )
        self.rules, notes = generation_config.cleared(own)
        self.ends = end_tokens(model, tokenizer, turn_end)
        notes += self._sample() + self._settle_ends()
        self.stop = stop_string(tokenizer, self.rules.stop_strings)
        self.rules.stop_strings = None
        self.prompt_end, self.end = positions.ends(model)
        self.made_for = positions.made_for(model)
        self.told_of_length = False
        for note in notes:
            warnings.warn(note, QcliWarning, stacklevel=3)

    def _sample(self) -> list[str]:
        """Puts the user's options over the model's. Temperature 0 is greedy, from either."""
        notes, options = [], self.sampling.options()
        if options.get("do_sample") and "temperature" not in options and self.rules.temperature == 0:
            options["temperature"] = 1.0
            notes.append("the generation config has temperature 0, which is greedy: sampling is at temperature 1")
        for name, value in options.items():
            setattr(self.rules, name, value)
        if self.rules.do_sample and self.rules.temperature == 0:
            self.rules.do_sample = False
        if not self.rules.do_sample:
            for name in generation_config.SAMPLING:
                setattr(self.rules, name, None)
        return notes

    def _settle_ends(self) -> list[str]:
        """Leaves out ends that the model cannot say, and rules that speak of an end where there is none."""
        beyond = {i for i in self.ends if i < 0 or (self.vocabulary is not None and i >= self.vocabulary)}
        self.ends -= beyond
        notes = []
        if any(i >= 0 for i in beyond):
            notes.append(
                f"token {max(beyond)} is to end a text, but the model's vocabulary has {self.vocabulary:,} tokens: it never comes"
            )
        if not self.ends and self.rules.exponential_decay_length_penalty is not None:
            self.rules.exponential_decay_length_penalty = None
            notes.append("exponential_decay_length_penalty favours the end of a text, and the model has no token for it")
        self.rules.eos_token_id = sorted(self.ends) or None
        # One sequence is never padded, but transformers reckons with the id.
        self.rules.pad_token_id = min(self.ends, default=0)
        return notes

    def limit(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt. Raises UsageError where positions end before the prompt does."""
        alone = self.model.config.is_encoder_decoder  # then the text begins with one token of its own
        if self.prompt_end is not None and prompt_tokens > self.prompt_end - (not alone):
            raise UsageError(
                f"the prompt has {prompt_tokens:,} tokens, the model's context holds {self.prompt_end:,}", "Shorten the prompt."
            )
        before = 1 if alone else prompt_tokens
        wanted = self.sampling.max_new_tokens or self.rules.max_new_tokens
        if wanted is None and (self.rules.max_length or 0) > before:
            wanted = self.rules.max_length - before
        wanted = wanted or DEFAULT_NEW_TOKENS
        return wanted if self.end is None else max(1, min(wanted, self.end - before))

    def generate(self, prompt_ids: list[int], on_token: Callable[[int], None]) -> Generation:
        """Continues `prompt_ids`; `on_token` hears of each new id at once, end tokens included.

        Raises UsageError for a prompt that leaves no room in the model's context, DeviceError where a GPU's memory does not
        do, CheckpointError where transformers cannot continue.
        """
        limit = self.limit(len(prompt_ids))
        self._tell_length(len(prompt_ids), "the prompt")
        # Weights that accelerate brings in only for their product are on "meta"; its hooks move the ids then.
        device = "cpu" if self.model.device.type == "meta" else self.model.device
        ids = torch.tensor([prompt_ids], dtype=torch.int64, device=device)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        heard = _Streamer(on_token, self.ends)
        free = out_of_memory.free_memory(gpus_of(self.model))
        try:
            with torch.inference_mode(), quiet(), self._in_force(limit, len(prompt_ids)):
                self._decode(ids, heard)
        except (*out_of_memory.KINDS, *_FAILURES) as e:
            if out_of_memory.is_out_of_memory(e):
                raise out_of_memory.while_generating(self.model, len(prompt_ids), limit, free) from e
            if isinstance(e, (QcliError, MemoryError)) or e is heard.refused:
                raise
            raise CheckpointError(
                f"{type(self.model).__name__} cannot continue this prompt: {first_line(e)}",
                "QCLI_TRACEBACK=1 shows where it stopped.",
            ) from e
        started = heard.captured_at or heard.started
        first = heard.first_at or time.monotonic()
        before = 0 if self.model.config.is_encoder_decoder else len(prompt_ids)
        self._tell_length(before + len(heard.token_ids), "the text")
        return Generation(
            heard.token_ids,
            len(prompt_ids),
            prefill_seconds=first - started,
            decode_seconds=(heard.last_at or first) - first,
            finished=bool(heard.token_ids) and (heard.token_ids[-1] in self.ends or bool(self.stop and self.stop.met)),
            capture_seconds=heard.captured_at and started - heard.started,
        )

    def _tell_length(self, tokens: int, what: str) -> None:
        if self.made_for is not None and tokens > self.made_for and self.end is None and not self.told_of_length:
            self.told_of_length = True
            warnings.warn(
                f"{what} has {tokens:,} tokens, the model was made for {self.made_for:,}: beyond them it may make no sense",
                QcliWarning,
                stacklevel=4,
            )

    @contextmanager
    def _in_force(self, limit: int, prompt_tokens: int) -> Iterator[None]:
        """The rules as the model's own for a while: transformers checks the model's generation config whatever it is given."""
        rules = copy.copy(self.rules)
        rules.max_new_tokens, rules.max_length = limit, None
        if rules.min_new_tokens is not None:
            rules.min_new_tokens, rules.min_length = min(rules.min_new_tokens, limit), None
        elif rules.min_length is not None and not self.model.config.is_encoder_decoder:
            rules.min_length = min(rules.min_length, prompt_tokens + limit)
        before, self.model.generation_config = self.model.generation_config, rules
        try:
            yield
        finally:
            self.model.generation_config = before

    def _decode(self, ids: torch.Tensor, heard: _Streamer) -> None:
        options = {"stopping_criteria": StoppingCriteriaList([self.stop])} if self.stop else {}
        capture = decode_graph.capture_for(self.model)
        if capture is not None:
            try:
                decode_graph.generate(self.model, ids, capture, heard.hear, heard.ready, **options)
                return
            except decode_graph.Unsupported:
                heard.started = time.monotonic()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=heard, **options)


def generate(model, tokenizer, prompt_ids: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Generation:
    """Continues one prompt: `Decoding.generate`, for a model that writes a single text."""
    return Decoding(model, tokenizer, sampling).generate(prompt_ids, on_token)


class TextStream:
    """Turns token ids into text as they come: whole characters only, with the spaces the tokenizer means.

    The text of an id depends on its neighbours, so each step decodes a short tail twice, with and without the new ids, and
    gives out the difference once it ends in no half character.
    """

    CONTEXT = 6  # earlier ids that a decoder may look at

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
        """What is left, half characters included."""
        before, now = self._decode(self.ids[self.start : self.shown]), self._decode(self.ids[self.start :])
        self.shown = len(self.ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
