"""One step of decoding over tensors at fixed addresses, so that it can be captured once and replayed.

A step reads its input where the last step wrote its output:

  token     int64 [1, 1]       the id to read next; the step replaces it by the id that it chose
  position  int64 []           the position of that id in the text, and of its keys and values in the cache
  history   int64 [1, length]  every id so far, then copies of the first; rules need which ids occurred, not how often
  cache     per layer keys and values [1, heads, span, head_dim]; the mask hides the positions beyond the text

When a text outgrows the span, the span is doubled and the step is captured again.
"""

import inspect
from collections.abc import Callable

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

from qcli.errors import KernelError
from qcli.loading import out_of_memory

# Positions of a cache at first, doubled until the prompt fits. Attention reads all of them at each step.
SPAN = 256

Step = Callable[[], None]
# Called with a rehearsal (which changes nothing) and the step. Returns a function that runs the step. May run the step itself.
Capture = Callable[[Step, Step], Step]


def cache_argument(model) -> str:
    """The name of a model's argument for its cache: "cache" from transformers 5.24 on, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Unsupported(Exception):
    """The model or one of the options cannot be run by this kind of step. No token has been made yet."""


class _Places:
    """What the layers of a cache share: the number of positions, and the position of the next token."""

    def __init__(self, device: torch.device):
        self.span, self.prefilling = SPAN, False
        self.position = torch.zeros((), dtype=torch.int64, device=device)


class _Layer(CacheLayerMixin):
    """Keys and values of one layer for the whole text, whatever its window. The mask selects the positions.

    A prefill attends to its own keys and values, as in transformers' own cache; this class only stores them.
    """

    is_compileable, is_sliding = True, False

    def __init__(self, places: _Places):
        super().__init__()
        self.places = places

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self._of_span(key_states[:, :, :0]), self._of_span(value_states[:, :, :0])
        self.is_initialized = True

    def stretch(self) -> None:
        """Makes room for the current span."""
        if self.is_initialized:
            self.keys = self._of_span(self.keys)
            self.values = self._of_span(self.values)

    def _of_span(self, old: torch.Tensor) -> torch.Tensor:
        batch, heads, count, head_dim = old.shape
        new = old.new_zeros(batch, heads, self.places.span, head_dim)  # zeros: a masked NaN would still be NaN
        new[:, :, :count] = old
        return new

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_, **__):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.places.prefilling:
            count = key_states.shape[-2]
            self.keys[:, :, :count].copy_(key_states)
            self.values[:, :, :count].copy_(value_states)
            return key_states, value_states
        place = self.places.position.view(1)
        self.keys.index_copy_(2, place, key_states)
        self.values.index_copy_(2, place, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (query_length if self.places.prefilling else self.places.span), 0

    def get_seq_length(self):
        return 0 if self.places.prefilling else self.places.position

    def get_max_length(self) -> int:
        return self.places.span


class Decoder:
    """The step of `model`, its tensors, and the function that replays it.

    `rules` turn logits into scores, as in transformers. The next id is the one with the best score, or, if `sampled`, drawn with
    the softmax of the scores. `prompt_tokens` is the length of the prompt, `length` that of the longest text. `ops` is the OpStep
    (op_step.py) that runs the layers of a step; None leaves them to transformers. Raises Unsupported.
    """

    def __init__(self, model, prompt_tokens: int, length: int, rules, sampled: bool, capture: Capture, ops=None):
        self.length = -(-length // SPAN) * SPAN
        self.model, self.rules, self.sampled, self.capture = model, rules, sampled, capture
        self.places = _Places(model.device)
        layers = len(DynamicCache(config=model.config).layers)
        self.cache = Cache(layers=[_Layer(self.places) for _ in range(layers)])
        self.cache_argument = cache_argument(model)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self.history = torch.zeros(1, self.length, dtype=torch.int64, device=model.device)
        self.at = 0  # the position, counted on the host
        self.replay: Step | None = None
        self.ops = ops
        try:
            if ops is not None:
                self.tables = ops.laid_out(self.length)
                for layer, keys in zip(self.cache.layers, ops.empty_keys()):
                    layer.lazy_initialization(keys, keys)
            self._capture(prompt_tokens)
        except (RuntimeError, KernelError, TypeError, ValueError) as e:
            if out_of_memory.is_out_of_memory(e) or (ops is None and isinstance(e, (TypeError, ValueError))):
                raise
            raise Unsupported from e

    def prefill(self, ids: torch.Tensor, options: dict) -> None:
        """Reads ids int64 [1, tokens] and chooses the first new id. `options` are further arguments of the model."""
        count = ids.shape[1]
        self.history.copy_(ids[:, :1].expand_as(self.history))
        self.history[:, :count] = ids
        positions = torch.arange(count, device=ids.device)[None]
        self.places.prefilling = True
        logits = self._logits(ids, positions, options)
        self.places.prefilling = False
        self.places.position.fill_(count)
        self.at = count
        self._choose(logits)

    def advance(self) -> None:
        """Launches a step."""
        if self.at == self.places.span:
            self._capture(self.at)
        self.replay()
        self.at += 1

    def _capture(self, place: int) -> None:
        """Captures a step whose span contains the position `place`."""
        while self.places.span <= place:
            self.places.span *= 2
        self.places.span = min(self.places.span, self.length)
        for layer in self.cache.layers:
            layer.stretch()
        state = (self.token, self.places.position, self.history)
        before = [tensor.clone() for tensor in state]

        def restore():
            for tensor, value in zip(state, before):
                tensor.copy_(value)

        def rehearse():
            self._step()
            restore()

        devices = [self.token.device] if self.token.is_cuda else []
        with torch.random.fork_rng(devices):  # a seed gives the same text, captured or not
            self.replay = self.capture(rehearse, self._step)
        restore()

    def _step(self) -> None:
        if self.ops is None:
            logits = self._logits(self.token, self.places.position.view(1, 1), {})
        else:
            logits = self.ops.logits(self.token[0], self.places.position, self.cache.layers, self.tables)
        self.places.position.add_(1)
        self._choose(logits)

    def _logits(self, ids: torch.Tensor, positions: torch.Tensor, options: dict) -> torch.Tensor:
        """Logits [1, vocabulary] after the last id."""
        options = options | {self.cache_argument: self.cache}
        output = self.model(input_ids=ids, position_ids=positions, use_cache=True, **options)
        return output.logits[:, -1]

    def _choose(self, logits: torch.Tensor) -> None:
        scores = self.rules(self.history, logits.to(copy=True, dtype=torch.float32))
        if self.sampled:
            # torch.multinomial draws in the same way, but may wait for the host to check the numbers.
            probabilities = scores.softmax(-1)
            scores = probabilities / torch.empty_like(probabilities).exponential_()
        token = scores.argmax(-1)
        self.token.copy_(token.view(1, 1))
        self.history.index_copy_(1, self.places.position.view(1), self.token)
