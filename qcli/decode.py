"""Token by token through a model: prefill, then one token at a time. Prints nothing.

On CUDA the step of a token is captured (decode_graph.py) where that can be. Elsewhere the loop is transformers' `generate`,
over the model's own cache; rules of sampling are its own everywhere.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qcli import decode_graph, out_of_memory
from qcli.devices import gpus_of
from qcli.errors import UsageError

DEFAULT_NEW_TOKENS = 128


@dataclass(frozen=True)
class Sampling:
    """What the user asked for; None leaves it to the model's generation_config. temperature 0 is greedy."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self):
        _check("max-new-tokens", self.max_new_tokens, lambda v: v >= 1, "1 or more")
        _check("temperature", self.temperature, lambda v: 0 <= v < float("inf"), "0 (greedy) or more")
        _check("top-p", self.top_p, lambda v: 0 < v <= 1, "above 0 and at most 1")
        _check("top-k", self.top_k, lambda v: v >= 1, "1 or more")

    def options(self) -> dict[str, object]:
        """Keyword arguments of transformers' generate."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        options = {name: value for name, value in given.items() if value is not None}
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return options | {"do_sample": True} if options else {}


def _check(name: str, value: float | None, good: Callable[[float], bool], expected: str) -> None:
    if value is not None and not good(value):
        raise UsageError(f"--{name} is {value}, expected {expected}")


@dataclass
class Generation:
    """The new token ids and what they took. The first one comes out of the prefill."""

    token_ids: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float
    finished: bool  # by an end token, not by the limit
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
        self.first_at = self.last_at = self.captured_at = None

    def ready(self) -> None:
        """Called when a step is captured; the prefill follows."""
        self.captured_at = time.monotonic()

    def hear(self, token: int) -> bool:
        """Notes a token; whether it ends the text."""
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        self.token_ids.append(token)
        self.on_token(token)
        return token in self.ends

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        for token in value.reshape(-1).tolist():
            self.hear(token)

    def end(self) -> None:
        """Called after the last token."""


def end_tokens(model, tokenizer) -> set[int]:
    """Every id that ends a text: the generation config's one or many, else the tokenizer's."""
    stated = model.generation_config.eos_token_id
    if stated is None:
        stated = tokenizer.eos_token_id
    return set() if stated is None else set(stated if isinstance(stated, (list, tuple)) else [stated])


def generate(
    model, tokenizer, prompt_ids: list[int], sampling: Sampling, on_token: Callable[[int], None]
) -> Generation:
    """Continues `prompt_ids`; `on_token` hears of each new id at once, end tokens included.

    Raises UsageError for a prompt that leaves no room in the model's context, DeviceError where a GPU's memory does not do.
    """
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    limit = sampling.max_new_tokens or model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
    decoder_only = not model.config.is_encoder_decoder
    if context and decoder_only:
        if len(prompt_ids) >= context:
            raise UsageError(
                f"the prompt has {len(prompt_ids):,} tokens, the model's context holds {context:,}",
                "Shorten the prompt.",
            )
        limit = min(limit, context - len(prompt_ids))
    ends = end_tokens(model, tokenizer)
    # Weights that accelerate brings in only for their product are on "meta"; its hooks move the ids then.
    ids = torch.tensor([prompt_ids], device="cpu" if model.device.type == "meta" else model.device)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    pad = model.generation_config.pad_token_id
    options = sampling.options() | {"max_new_tokens": limit, "eos_token_id": sorted(ends) or None}
    if pad is None and ends:
        options["pad_token_id"] = min(ends)  # one sequence is never padded; transformers warns all the same
    heard = _Streamer(on_token, ends)
    free = out_of_memory.free_memory(gpus_of(model))
    try:
        with torch.inference_mode():
            _decode(model, ids, heard, options)
    except out_of_memory.KINDS as e:
        if not out_of_memory.is_one(e):
            raise
        raise out_of_memory.while_generating(model, len(prompt_ids), limit, free) from e
    started = heard.captured_at or heard.started
    first = heard.first_at or time.monotonic()
    return Generation(
        heard.token_ids,
        len(prompt_ids),
        prefill_seconds=first - started,
        decode_seconds=(heard.last_at or first) - first,
        finished=bool(heard.token_ids) and heard.token_ids[-1] in ends,
        capture_seconds=heard.captured_at and started - heard.started,
    )


def _decode(model, ids: torch.Tensor, heard: _Streamer, options: dict[str, object]) -> None:
    capture = decode_graph.capture_for(model)
    if capture is not None:
        try:
            decode_graph.generate(model, ids, capture, heard.hear, heard.ready, **options)
            return
        except decode_graph.Unsupported:
            heard.started = time.monotonic()
    model.generate(ids, attention_mask=torch.ones_like(ids), streamer=heard, **options)


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
