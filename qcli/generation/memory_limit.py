"""How near decoding comes to what memory allows: each step reads every weight and the cache once, as fast as memory is read."""

from collections.abc import Iterable

import torch

from qcli.nn.low_rank import adapter_bytes
from qcli.runtime import cpu

_ENOUGH = 256 << 20  # bytes that are read to measure the speed of memory


def bytes_a_step(model) -> int | None:
    """Bytes of weights that a step reads, an adapter's among them: all but the rows of an embedding. None for a mixture of experts,
    which reads some of them, and for an encoder-decoder."""
    names = [name for name, _ in model.named_parameters()]
    if model.config.is_encoder_decoder or any("expert" in name for name in names):
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is not None and head.weight is embedding.weight
    weights = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(weights.values()) + adapter_bytes(model) - (0 if tied else embedding.weight.nbytes)


def memory_speed(model) -> float | None:
    """Bytes per second at which this machine reads the model's weights, measured in a tenth of a second.

    None if they are not on a CPU, or if a cache holds what a step reads.
    """
    read = bytes_a_step(model)
    if cpu.variant() is None or model.device.type != "cpu" or read is None or read < cpu.last_level_cache():
        return None
    return cpu.read_speed(list(_largest(model.parameters())))


def _largest(tensors: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    total = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.nbytes, reverse=True):
        if total >= _ENOUGH or tensor.device.type != "cpu":
            return
        total += tensor.nbytes
        yield tensor
