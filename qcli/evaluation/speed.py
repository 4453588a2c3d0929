"""How fast a model reads and writes, and what memory it takes, loaded whole as `qcli generate` loads it."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from qcli.devices import gpus_of
from qcli.generation import decode
from qcli.loading import load as model
from qcli.nn.low_rank import adapter_bytes
from qcli.process import peak_memory, reset_peak_memory

PROMPT_TOKENS = 256
NEW_TOKENS = 32


@dataclass(frozen=True)
class Speed:
    """`prefill` and `decode` are tokens a second: of a prompt of `prompt_tokens`, and of the tokens after the first new one.
    `peak_memory` is the highest number of bytes from loading on, of the GPUs where the model is on them. `weights` are bytes in
    memory."""

    prompt_tokens: int
    prefill: float
    decode: float | None
    peak_memory: int
    weights: int


def measure(name: str, ids: Sequence[int], limit: int | None, **options: object) -> Speed:
    """Loads `name` by qcli.loading.load.load with `options` and continues the first ids, once to warm up and once to measure.

    `limit` is the model's context. End tokens do not end the text, so that every model writes as many tokens.
    """
    import torch

    prompt = list(ids[: PROMPT_TOKENS if limit is None else max(min(PROMPT_TOKENS, limit - NEW_TOKENS), 1)])
    gc.collect()
    reset_peak_memory()
    for gpu in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(gpu)
    loaded, _ = model.load(name, **options)
    loaded.generation_config.eos_token_id = None
    endless = SimpleNamespace(eos_token_id=None)
    for count in (2, NEW_TOKENS):
        done = decode.generate(loaded, endless, prompt, decode.Sampling(count, temperature=0), lambda token: None)
    gpus = gpus_of(loaded)
    return Speed(
        prompt_tokens=len(prompt),
        prefill=done.prefill_rate,
        decode=done.decode_rate,
        peak_memory=sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) if gpus else peak_memory(),
        weights=sum(t.numel() * t.element_size() for t in [*loaded.parameters(), *loaded.buffers()]) + adapter_bytes(loaded),
    )
