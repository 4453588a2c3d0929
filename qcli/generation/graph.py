"""Decoding as one captured step: a CUDA graph records the launches of one token, and is replayed for every token.

Ids are copied to the host while the next step runs, and read one step late, so no step waits for the host. When a text has
ended, one id too many has been made; it is dropped. transformers prepares the prompt and the sampling rules.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from qcli.generation.step import Capture, Decoder, Step, Unsupported
from qcli.nn.quantized_linear import QuantizedLinear

# The rules that a captured step supports: they neither depend on the length of the text nor run on the host.
_RULES = {MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper}
_STOPS = {EosTokenCriteria, MaxLengthCriteria}
_LONGEST = 1 << 20  # tokens of a text: the history of the whole text is allocated at once
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}


def capture_for(model) -> Capture | None:
    """The function that captures a step of `model`. None where a step cannot be captured: not on CUDA, split over devices, or with
    a quantized module that runs without a kernel, because the reference waits for the host."""
    tensors = [*model.parameters(), *model.buffers()]
    device = model.device
    if device.type != "cuda" or any(tensor.device != device for tensor in tensors):
        return None
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        return _cuda_capture(device, torch.cuda.Stream(device))
    from qcli.runtime import cuda

    return _cuda_capture(device, cuda.capture_stream(device)) if cuda.serves(tensors[0]) else None


def _cuda_capture(device: torch.device, stream) -> Capture:
    def capture(rehearse: Step, step: Step) -> Step:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                rehearse()  # compiles and loads every kernel: a capture does not allow that
                with _no_waits():
                    rehearse()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()
        return graph.replay

    return capture


@contextmanager
def _no_waits() -> Iterator[None]:
    """Makes torch raise RuntimeError where it would wait for the GPU. Here this error is harmless, inside a capture it is not."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def supported(model) -> bool:
    """Whether a step of `model` can be captured. transformers must declare that the model works with a static cache. Its layers,
    positions and masks must be full or sliding attention, positions passed as an argument, masks made from the cache's length."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or config is not model.config or not getattr(model, "_can_compile_fullgraph", 0):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager") or getattr(config, "alibi", False):
        return False
    rope = _rope_types(getattr(config, "rope_parameters", None))
    if not rope.isdisjoint({"dynamic", "longrope"}):  # recomputed when the text grows beyond a length
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    kinds = set(getattr(config, "layer_types", None) or ())
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    return (
        bool(layers)
        and layers <= {DynamicLayer, DynamicSlidingWindowLayer}
        and kinds <= {"full_attention", "sliding_attention"}
        and getattr(config, "attention_chunk_size", None) is None
    )


def _rope_types(parameters) -> set[str]:
    """Every rope_type in a config's rope_parameters, which hold either one set or one set per kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {parameters.get("rope_type")} - {None}
    return found.union(*(_rope_types(value) for value in parameters.values()))


def generate(model, ids: torch.Tensor, capture: Capture, on_token: Callable[[int], bool], ready: Step, ops=None, **options) -> bool:
    """Continues ids int64 [1, tokens] by transformers' rules for `options`, arguments of its `generate`.

    `on_token` is called with each new id and returns whether it was the last. `ready` is called when the step is captured and
    before the prompt is read. `ops` is the OpStep that runs the layers, if it can be captured; None leaves them to transformers.
    Raises Unsupported before the first call of `on_token`. Returns whether the ops were captured.
    """
    by_ops = ops is not None

    def decode(_, input_ids, *, logits_processor, stopping_criteria, generation_config, **inputs):
        if not _RULES.issuperset(map(type, logits_processor)) or not _STOPS.issuperset(map(type, stopping_criteria)):
            raise Unsupported
        if generation_config.get_generation_mode() not in _MODES or len(input_ids) != 1:
            raise Unsupported
        if generation_config.use_cache is False or generation_config.max_length > _LONGEST:
            raise Unsupported
        count, length = input_ids.shape[1], generation_config.max_length
        nonlocal by_ops
        rest = model, count, length, logits_processor, generation_config.do_sample, capture
        try:
            decoder = Decoder(*rest, ops)
        except Unsupported:
            if ops is None:
                raise
            by_ops, decoder = False, Decoder(*rest)
        ready()
        keep = {name: value for name, value in inputs.items() if name == "logits_to_keep"}
        _run(decoder, input_ids, length - count, on_token, keep)
        return input_ids

    if not supported(model):
        raise Unsupported
    model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decode, **options)
    return by_ops


def _run(decoder: Decoder, ids: torch.Tensor, limit: int, on_token: Callable[[int], bool], keep: dict) -> None:
    """Makes at most `limit` ids. `on_token` gets each id after the next step was launched."""
    reader = _Reader(limit, decoder.token.device)
    try:
        for i in range(limit):
            if i:
                decoder.advance()
            else:
                decoder.prefill(ids, keep)
            reader.send(i, decoder.token)
            if i and on_token(reader.get(i - 1)):
                return
        on_token(reader.get(limit - 1))
    finally:
        reader.wait()  # a graph that still runs must not be destroyed


class _Reader:
    """Copies ids to the host while the next step runs."""

    def __init__(self, limit: int, device: torch.device):
        self.cuda = device.type == "cuda"
        self.ids = torch.zeros(limit, dtype=torch.int64, pin_memory=self.cuda)
        self.events: dict[int, torch.cuda.Event] = {}

    def send(self, i: int, token: torch.Tensor) -> None:
        self.ids[i : i + 1].copy_(token.view(1), non_blocking=True)
        if self.cuda:
            self.events[i] = torch.cuda.Event()
            self.events[i].record()

    def get(self, i: int) -> int:
        if self.cuda:
            self.events.pop(i).synchronize()
        return int(self.ids[i])

    def wait(self) -> None:
        """Waits until everything sent has arrived."""
        for event in self.events.values():
            event.synchronize()
