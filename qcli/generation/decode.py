"""Generates text with a model: first the prefill, then one token at a time. Prints nothing.

On CUDA the step of one token is captured if possible (graph.py). On a CPU a program of ops replaces it if possible (lean.py).
Otherwise transformers' `generate` runs the loop with the model's own cache. The sampling rules are transformers' own in all cases.
"""

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList

from qcli.devices import gpus_of
from qcli.errors import CheckpointError, QcliError, QcliWarning, UsageError, first_line, one_of
from qcli.generation import graph as decode_graph
from qcli.generation import lean, positions
from qcli.generation.can_generate import check_class
from qcli.generation.drafts import Draft
from qcli.generation.generated import Generation
from qcli.generation.op_step import OpStep, op_step
from qcli.generation.sampling import Sampling
from qcli.generation.step import Unsupported
from qcli.generation.stop_string import stop_string
from qcli.loading import generation_config, out_of_memory
from qcli.loading.load import quiet

DEFAULT_NEW_TOKENS = 128
# Errors that transformers and other people's models raise when they cannot continue.
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


# What reading the modules of an unusual model may raise.
_ODD = (AttributeError, LookupError, TypeError, ValueError)


class _Streamer:
    """Records each token and its time. transformers calls `put` with the prompt first and then with each token."""

    def __init__(self, on_token: Callable[[int], None], ends: set[int]):
        self.on_token, self.ends, self.prompt_is_next = on_token, ends, True
        self.token_ids: list[int] = []
        self.started = time.monotonic()
        self.first_at = self.last_at = self.ready_at = self.refused = None

    def restart(self) -> None:
        """Called when another way is tried, before any token."""
        self.started, self.ready_at = time.monotonic(), None

    def ready(self) -> None:
        """Called when the step is made and before the prefill."""
        self.ready_at = time.monotonic()

    def add(self, token: int) -> bool:
        """Records a token. Returns whether it ends the text."""
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
            self.add(token)

    def end(self) -> None:
        """Called after the last token."""


def end_tokens(model, tokenizer, turn_end: int | None = None) -> set[int]:
    """Every id that ends a text: those of the generation config, the tokenizer's, and `turn_end` in a chat."""
    stated = model.generation_config.eos_token_id
    stated = list(stated) if isinstance(stated, (list, tuple)) else [stated]
    return {i for i in (*stated, tokenizer.eos_token_id, turn_end) if i is not None}


def lean_of(model, kv_int8: bool = False) -> lean.Lean | None:
    """The lean step of a model; None where it cannot run."""
    try:
        return lean.Lean(model, kv_int8) if lean.wanted(model) else None
    except (Unsupported, *_ODD):
        return None


class Decoding:
    """Generates texts by one set of rules: the model's generation config, checked, with the user's options on top.

    `ends` are the ids that end a text. `draft` guesses tokens for the lean step; it is not used where another step runs. `kv_dtype`
    int8 halves the cache of the lean step. Warns (QcliWarning) once about each field that is overridden. Raises CheckpointError for
    a field with an invalid value.
    """

    def __init__(
        self,
        model,
        tokenizer,
        sampling: Sampling,
        turn_end: int | None = None,
        draft: Draft | None = None,
        kv_dtype: str | None = None,
    ):
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
        self.length_warned = False
        if kv_dtype is not None:
            one_of("kv_dtype", kv_dtype, ("int8",))
        self.kv_int8 = kv_dtype is not None
        self.lean, self.draft = lean_of(model, self.kv_int8), draft
        self.ops: OpStep | Literal[False] | None = None  # of a captured step; made for the first text, False where there is none
        if self.kv_int8 and self.lean is None:
            raise self._no_int8_cache()
        for note in notes:
            warnings.warn(note, QcliWarning, stacklevel=3)

    def _sample(self) -> list[str]:
        """Applies the user's options over the model's. Temperature 0 means greedy in both."""
        notes, options = [], self.sampling.options()
        if options.get("do_sample") and "temperature" not in options and self.rules.temperature == 0:
            options["temperature"] = 1.0
            notes.append("the generation config has temperature 0, which is greedy: sampling uses temperature 1")
        for name, value in options.items():
            setattr(self.rules, name, value)
        if self.rules.do_sample and self.rules.temperature == 0:
            self.rules.do_sample = False
        if not self.rules.do_sample:
            for name in generation_config.SAMPLING:
                setattr(self.rules, name, None)
        return notes

    def _settle_ends(self) -> list[str]:
        """Removes end tokens beyond the vocabulary, and rules about an end token where there is none."""
        beyond = {i for i in self.ends if i < 0 or (self.vocabulary is not None and i >= self.vocabulary)}
        self.ends -= beyond
        notes = []
        if any(i >= 0 for i in beyond):
            notes.append(
                f"token {max(beyond)} should end a text, but the model's vocabulary has {self.vocabulary:,} tokens: it never comes"
            )
        if not self.ends and self.rules.exponential_decay_length_penalty is not None:
            self.rules.exponential_decay_length_penalty = None
            notes.append("exponential_decay_length_penalty favours the end of a text, but the model has no end token")
        self.rules.eos_token_id = sorted(self.ends) or None
        # One sequence is never padded, but transformers reads the id.
        self.rules.pad_token_id = min(self.ends, default=0)
        return notes

    def limit(self, prompt_tokens: int) -> int:
        """How many tokens may follow a prompt. Raises UsageError if the prompt is longer than the model's positions."""
        alone = self.model.config.is_encoder_decoder  # the text is then apart from the prompt and begins with one start token
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
        """Continues `prompt_ids`. `on_token` is called with each new id at once, end tokens included.

        Raises UsageError for a prompt that leaves no room in the model's context, DeviceError where the GPU's memory is too
        small, CheckpointError where transformers cannot continue.
        """
        limit = self.limit(len(prompt_ids))
        self._warn_of_length(len(prompt_ids), "the prompt")
        # accelerate keeps weights on "meta" until their product needs them. Its hooks then move the ids.
        device = "cpu" if self.model.device.type == "meta" else self.model.device
        ids = torch.tensor([prompt_ids], dtype=torch.int64, device=device)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        streamer = _Streamer(on_token, self.ends)
        free = out_of_memory.free_memory(gpus_of(self.model))
        try:
            with torch.inference_mode(), quiet(), self._in_force(limit, len(prompt_ids)):
                step, steps = self._decode(ids, streamer)
        except (*out_of_memory.KINDS, *_FAILURES) as e:
            if out_of_memory.is_out_of_memory(e):
                raise out_of_memory.while_generating(self.model, len(prompt_ids), limit, free) from e
            if isinstance(e, (QcliError, MemoryError)) or e is streamer.refused:
                raise
            raise CheckpointError(
                f"{type(self.model).__name__} cannot continue this prompt: {first_line(e)}",
                "QCLI_TRACEBACK=1 shows where it stopped.",
            ) from e
        started = streamer.ready_at or streamer.started
        first = streamer.first_at or time.monotonic()
        before = 0 if self.model.config.is_encoder_decoder else len(prompt_ids)
        self._warn_of_length(before + len(streamer.token_ids), "the text")
        return Generation(
            streamer.token_ids,
            len(prompt_ids),
            prefill_seconds=first - started,
            decode_seconds=(streamer.last_at or first) - first,
            finished=bool(streamer.token_ids) and (streamer.token_ids[-1] in self.ends or bool(self.stop and self.stop.met)),
            capture_seconds=started - streamer.started if step == "captured" else None,
            step=step,
            steps=steps,
            cache_bytes=self.lean.cache_bytes(len(prompt_ids) + len(streamer.token_ids) / 2) if step == "lean" else None,
            kept_tokens=self.lean.kept if step == "lean" else 0,
        )

    def _useful_draft(self) -> Draft | None:
        """The draft, if it can guess. Warns once about one that cannot."""
        reason = None
        if self.lean is None:
            reason = f"{type(self.model).__name__} does not run with the lean step here, and makes one token at a time"
        elif self.lean.mixes:
            reason = "with int8 activations the tokens of a step share their outlier columns, and guesses would change the text"
        if self.draft is not None and reason:
            self.draft = None
            warnings.warn(f"--draft is not used: {reason}", QcliWarning, stacklevel=4)
        return self.draft

    def _no_int8_cache(self) -> UsageError:
        name = type(self.model).__name__
        return UsageError(
            f"--kv-dtype 8: {name} runs with transformers' step here, whose cache has the model's dtype",
            "Leave it out. It works on a CPU, with the models that docs/generate.md lists.",
        )

    def _warn_of_length(self, tokens: int, what: str) -> None:
        if self.made_for is not None and tokens > self.made_for and self.end is None and not self.length_warned:
            self.length_warned = True
            warnings.warn(
                f"{what} has {tokens:,} tokens, the model was made for {self.made_for:,}: beyond them it may make no sense",
                QcliWarning,
                stacklevel=4,
            )

    @contextmanager
    def _in_force(self, limit: int, prompt_tokens: int) -> Iterator[None]:
        """Makes the rules the model's own while this lasts: transformers checks the model's generation config in any case."""
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

    def _decode(self, ids: torch.Tensor, streamer: _Streamer) -> tuple[str, int | None]:
        """Returns what ran the steps, and their number if a step may make several tokens."""
        options = {"stopping_criteria": StoppingCriteriaList([self.stop])} if self.stop else {}
        capture = decode_graph.capture_for(self.model)
        if capture is not None:
            if self.ops is None:
                self.ops = op_step(self.model) or False
            try:
                by_ops = decode_graph.generate(self.model, ids, capture, streamer.add, streamer.ready, self.ops or None, **options)
                self.ops = by_ops and self.ops
                return "captured", None
            except Unsupported:
                streamer.restart()
        elif self.lean is not None:
            try:
                made = lean.generate(self.model, ids, self.lean, streamer.add, streamer.ready, self._useful_draft(), **options)
                return "lean", made
            except Unsupported:
                if self.kv_int8:
                    raise self._no_int8_cache() from None
                self.lean = None
                streamer.restart()
        self._useful_draft()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **options)
        return "transformers", None


def generate(model, tokenizer, prompt_ids: list[int], sampling: Sampling, on_token: Callable[[int], None]) -> Generation:
    """Continues one prompt. The same as `Decoding.generate`, for a single text."""
    return Decoding(model, tokenizer, sampling).generate(prompt_ids, on_token)
