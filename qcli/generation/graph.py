"""Decoding as one captured step: the launches of a token are recorded once, as a CUDA graph, and replayed for each token.

Ids travel to the host while the next step runs and are looked at one step late: no step waits for the host, a text that has
ended is noticed by then, and the id that was one too many is dropped. Prompts and sampling rules go through transformers.
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

# What a step can be made of: nothing that looks at the length of the text or runs on the host.
_RULES = {MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper}
_STOPS = {EosTokenCriteria, MaxLengthCriteria}
_LONGEST = 1 << 20  # tokens of a text: what a step keeps of each is made room for at once
_MODES = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}


def capture_for(model) -> Capture | None:
    """How a step of `model` is captured; None where it must not be: off CUDA, split over devices, or where a quantized module
    runs without a kernel, for the references wait for the host."""
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
                rehearse()  # compiles and loads every kernel, which a capture does not allow
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
    """Makes torch raise RuntimeError where it would wait for the GPU: here that does no harm, in a capture it would."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def supported(model) -> bool:
    """Whether transformers declares the model fit for a static cache, and its layers, positions and masks are of the kinds that
    a step knows: full and sliding attention, given positions, masks made from the cache's own length."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or config is not model.config or not getattr(model, "_can_compile_fullgraph", 0):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager") or getattr(config, "alibi", False):
        return False
    rope = _rope_types(getattr(config, "rope_parameters", None))
    if not rope.isdisjoint({"dynamic", "longrope"}):  # recomputed when the text outgrows a length
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
    """Every rope_type in a config's rope_parameters, which may hold one set of them or one per kind of layer."""
    if not isinstance(parameters, dict):
        return set()
    found = {parameters.get("rope_type")} - {None}
    return found.union(*(_rope_types(value) for value in parameters.values()))


def generate(model, ids: torch.Tensor, capture: Capture, hear: Callable[[int], bool], ready: Step, **options) -> None:
    """Continues ids int64 [1, tokens] by transformers' rules for `options`, arguments of its `generate`.

    `hear` takes each new id and says whether it was the last; `ready` is called when the step is captured and before the
    prompt is read. Raises Unsupported before anything was heard.
    """

    def decode(_, input_ids, *, logits_processor, stopping_criteria, generation_config, **inputs):
        if not _RULES.issuperset(map(type, logits_processor)) or not _STOPS.issuperset(map(type, stopping_criteria)):
            raise Unsupported
        if generation_config.get_generation_mode() not in _MODES or len(input_ids) != 1:
            raise Unsupported
        if generation_config.use_cache is False or generation_config.max_length > _LONGEST:
            raise Unsupported
        count, length = input_ids.shape[1], generation_config.max_length
        decoder = Decoder(model, count, length, logits_processor, generation_config.do_sample, capture)
        ready()
        keep = {name: value for name, value in inputs.items() if name == "logits_to_keep"}
        _run(decoder, input_ids, length - count, hear, keep)
        return input_ids

    if not supported(model):
        raise Unsupported
    model.generate(ids, attention_mask=torch.ones_like(ids), custom_generate=decode, **options)


def _run(decoder: Decoder, ids: torch.Tensor, limit: int, hear: Callable[[int], bool], keep: dict) -> None:
    """At most `limit` ids, each heard after the launch of the step behind it."""
    reader = _Reader(limit, decoder.token.device)
    try:
        for i in range(limit):
            if i:
                decoder.advance()
            else:
                decoder.prefill(ids, keep)
            reader.send(i, decoder.token)
            if i and hear(reader.get(i - 1)):
                return
        hear(reader.get(limit - 1))
    finally:
        reader.wait()  # a graph that still runs must not be destroyed


class _Reader:
    """Takes ids to the host behind the step's back."""

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
        """Until everything sent has arrived."""
        for event in self.events.values():
            event.synchronize()
