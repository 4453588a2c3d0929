"""Where a run stands, as one file: what is trained, the optimizer's moments, the best so far, and what was measured.

The file is written whole or not at all, and has all that the rest of the run depends on. So a run that goes on from it makes the
same folder as one that was never stopped. Dropout draws anew for each step, and the order of rows follows from the seed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors
import torch

from qcli.checkpoint import dtypes
from qcli.checkpoint.safetensors_file import build_header
from qcli.errors import CheckpointError
from qcli.files.whole import write_file

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """`step` steps are done. Held-out losses are nats a token: `before` training, and `measured`, (step, loss) of each measurement.
    `best` is the best step. `samples` are continuations before training. `tokens` have passed the model in
    `seconds`, of which training took `trained_seconds`. `logged` is the length of the log, in bytes."""

    step: int = 0
    before: float | None = None
    measured: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    samples: list[str] = field(default_factory=list)
    tokens: int = 0
    trained_seconds: float = 0.0
    base_hash: str = ""
    logged: int = 0


def save_state(
    path: Path,
    progress: Progress,
    trained: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Writes the file. Returns its bytes. Raises CheckpointError where there is no room for it."""
    moments, plain = _flat(optimizer.state_dict()["state"])
    kinds = {"trained": trained, "best": best, "optimizer": moments}
    tensors = {f"{kind}.{name}": tensor for kind, those in kinds.items() for name, tensor in those.items()}
    specs = [(name, dtypes.CODES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for name, t in tensors.items()]
    header, _ = build_header(specs, {"progress": json.dumps(asdict(progress)), "optimizer": json.dumps(plain)})
    size = len(header) + sum(tensor.nbytes for tensor in tensors.values())
    try:
        write_file(path, chain((header,), map(_bytes, tensors.values())))
    except OSError as e:
        raise CheckpointError(
            f"cannot write {path} ({size:,} bytes): {e.strerror}", "Mend that and run the same command again: it goes on."
        ) from e
    return size


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read_state(path: Path) -> tuple[Progress, Tensors, Tensors, dict[int, dict[str, Any]]] | None:
    """(progress, trained, best, the optimizer's state) of the file; None where there is none. Raises CheckpointError."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # not pages of a file that is replaced
        progress = Progress(**json.loads(about["progress"]))
        plain = json.loads(about["optimizer"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: {e}", "Delete the .partial folder to start anew.") from e
    progress.measured = [(step, loss) for step, loss in progress.measured]

    def named(kind: str) -> Tensors:
        return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}

    state: dict[int, dict[str, Any]] = {}
    for name, value in (*plain.items(), *named("optimizer").items()):
        number, *inner, key = name.split(".")
        place = state.setdefault(int(number), {})
        for part in inner:
            place = place.setdefault(part, {})
        place[key] = value
    return progress, named("trained"), named("best"), state


def _flat(state: Mapping[int, Mapping[str, Any]]) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, other values) of an optimizer's state, by number and names: bitsandbytes' has a dict in it."""
    entries = list(_entries("", state))
    return {n: v for n, v in entries if isinstance(v, torch.Tensor)}, {n: v for n, v in entries if not isinstance(v, torch.Tensor)}


def _entries(prefix: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _entries(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value
