"""Where a run stands, as one file: adapters, the optimizer's moments, the best adapters so far, and what was measured.

The file is written whole or not at all, and has all that the rest of the run depends on. So a run that goes on from it makes the
same adapters as one that was never stopped. Dropout draws anew for each step, and the order of rows follows from the seed.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, save

from qcli.errors import CheckpointError
from qcli.files.whole import write_file

Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """`step` steps are done. Held-out losses are nats a token: `before` training, and `measured`, (step, loss) of each measurement.
    `best` is the step whose adapters are the best. `samples` are continuations before training. `tokens` have passed the model in
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
    adapters: Mapping[str, torch.Tensor],
    best: Mapping[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Writes the file. Returns its bytes. Raises CheckpointError where there is no room for it."""
    moments, plain = _flat(optimizer.state_dict()["state"])
    tensors = {f"adapter.{name}": t for name, t in adapters.items()} | {f"best.{name}": t for name, t in best.items()}
    tensors |= {f"optimizer.{name}": t for name, t in moments.items()}
    data = save(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        {"progress": json.dumps(asdict(progress)), "optimizer": json.dumps(plain)},
    )
    try:
        write_file(path, data)
    except OSError as e:
        raise CheckpointError(
            f"cannot write {path} ({len(data):,} bytes): {e.strerror}", "Mend that and run the same command again: it goes on."
        ) from e
    return len(data)


def read_state(path: Path) -> tuple[Progress, Tensors, Tensors, dict[int, dict[str, Any]]] | None:
    """(progress, adapters, best adapters, the optimizer's state) of the file; None where there is none. Raises CheckpointError."""
    if not path.exists():
        return None
    try:
        data = path.read_bytes()
        tensors = load(data)
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata()
        progress = Progress(**json.loads(about["progress"]))
        plain = json.loads(about["optimizer"])
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{path} is damaged: {e}", "Delete the .partial folder to start anew.") from e
    progress.measured = [(step, loss) for step, loss in progress.measured]

    def named(kind: str) -> Tensors:
        return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}

    state: dict[int, dict[str, Any]] = {}
    for name, value in (*plain.items(), *named("optimizer").items()):
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    return progress, named("adapter"), named("best"), state


def _flat(state: Mapping[int, Mapping[str, Any]]) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, other values) of an optimizer's state, by number and name."""
    entries = list(_entries(state))
    return {n: v for n, v in entries if isinstance(v, torch.Tensor)}, {n: v for n, v in entries if not isinstance(v, torch.Tensor)}


def _entries(state: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for number, values in state.items():
        for key, value in values.items():
            yield f"{number}.{key}", value
