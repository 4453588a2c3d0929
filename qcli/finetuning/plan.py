"""What a run will do, known before a weight is read: rows and their tokens, what is trained, steps, memory.

Only headers, the config and the tokenizer of the model are read for it, and all of the data.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

from qcli import __version__
from qcli.devices import DeviceChoice
from qcli.errors import DeviceError, UsageError
from qcli.finetuning.batches import Order
from qcli.finetuning.encoding import Row
from qcli.finetuning.examples import files_of
from qcli.finetuning.rows import Rows
from qcli.finetuning.settings import Options
from qcli.finetuning.trained import Target, Trained
from qcli.memory.components import Component
from qcli.quantization.plan import Shard, Work
from qcli.recipe import Recipe
from qcli.sizes import format_bytes
from qcli.streaming.skeleton import Skeleton

_FEW_EXAMPLES, _EPOCHS = 10_000, 3  # so many epochs for fewer examples than that; one for more, and for texts


@dataclass
class Plan:
    """See the module. `output` is the folder that is written.
    `memory` has the components of the estimate, where one could be made, and `free` the bytes there are for them. `notes` are
    sentences on what the user may not expect."""

    skeleton: Skeleton
    recipe: Recipe | None
    output: Path
    options: Options
    rows: Rows
    trained: Trained
    placement: DeviceChoice
    dtype: str
    checkpointing: bool
    data: Mapping[str, str]  # file to the SHA-256 of its bytes
    memory: list[Component] = field(default_factory=list)
    free: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def order(self) -> Order:
        return Order(len(self.rows.train), self.options.batch, self.options.seed)

    @property
    def epochs(self) -> float:
        """As asked for, or as many as the number of examples suggests."""
        if self.options.steps is not None:
            return self.options.steps / self.order.steps_per_epoch
        few = self.rows.form != "text" and len(self.rows.train) < _FEW_EXAMPLES
        return self.options.epochs or (_EPOCHS if few else 1)

    @property
    def steps(self) -> int:
        return self.options.steps or max(1, round(self.epochs * self.order.steps_per_epoch))

    @property
    def eval_steps(self) -> int:
        """Steps between two measurements of the held-out loss."""
        return self.options.rare.eval_steps or -(-self.steps // 10)

    @property
    def targets(self) -> list[Target]:
        """The modules that are trained or get adapters."""
        return self.trained.targets

    @property
    def parameters(self) -> int:
        """That are trained."""
        return self.trained.parameters

    @property
    def output_bytes(self) -> int:
        return self.trained.output_bytes

    @property
    def work(self) -> Sequence[Work]:
        """See Staged."""
        return self.trained.work

    @property
    def shards(self) -> Sequence[Shard]:
        """See Staged."""
        return self.trained.shards

    @property
    def memory_bytes(self) -> int | None:
        """What the estimate comes to; None where none could be made."""
        return sum(part.bytes for part in self.memory) or None

    @property
    def identity(self) -> dict[str, object]:
        """What the result depends on. A run with another one does not go on from this one's state."""
        source = self.skeleton.source
        options = asdict(self.options) | {"steps": self.steps, "epochs": self.epochs}
        rare = options.pop("rare")
        return {
            "qcli": __version__,
            "base": source.fingerprint,
            "quantized as read": self.recipe.summary() if self.recipe else None,
            "data": dict(self.data),
            "rows": _digest(self.rows.train),
            "held-out rows": _digest(self.rows.held_out),
            "dtype": self.dtype,
            "checkpointing": self.checkpointing,
            **options,
            **rare,
        }

    def check(self) -> None:
        """Raises DeviceError where there is no room for the run."""
        if self.memory_bytes is not None and self.free is not None and self.memory_bytes > self.free:
            largest = max(self.memory, key=lambda part: part.bytes)
            ways = ["a smaller --max-tokens"]
            if not self.checkpointing:
                ways.insert(0, "--set checkpointing=true")
            ways = self.trained.smaller + ways
            raise DeviceError(
                f"training {self.skeleton.source.label} needs {format_bytes(self.memory_bytes)}, of which {largest.name} "
                f"{format_bytes(largest.bytes)}, and {format_bytes(self.free)} are free",
                f"Try {' or '.join(ways)}.",
            )

    def summary(self) -> dict[str, object]:
        """For JSON."""
        rows = self.rows
        return {
            "output": str(self.output),
            "model": self.skeleton.source.label,
            "train": self.options.rare.train,
            "form": rows.form,
            "examples": rows.counts.examples,
            "rows": len(rows.train),
            "held_out_rows": len(rows.held_out),
            "tokens": rows.tokens,
            "trained_tokens": rows.trained,
            "cut_rows": rows.counts.cut,
            "cut_tokens": rows.counts.lost_tokens,
            "split_rows": rows.counts.split,
            "dropped_rows": len(rows.counts.dropped),
            "modules": len(self.targets),
            "parameters": self.parameters,
            "steps": self.steps,
            "epochs": round(self.epochs, 4),
            "dtype": self.dtype,
            "memory": {part.name: part.bytes for part in self.memory},
            "memory_bytes": self.memory_bytes,
            "free_bytes": self.free,
            "notes": self.notes,
        }


def hashes(data: str | Path, held_out: str | Path | Fraction | None) -> dict[str, str]:
    """SHA-256 of the files of a run, by their names."""
    train, valid = files_of(data)
    if isinstance(held_out, str | Path):
        valid = files_of(held_out)[0]
    found = {}
    for path in filter(None, (train, valid)):
        try:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise UsageError(f"cannot read {path}: {e.strerror}") from e
    return found


def _digest(rows: Sequence[Row]) -> str:
    """SHA-256 of the tokens and of which of them are learnt: another tokenizer or template makes other rows of the same data."""
    digest = hashlib.sha256(json.dumps([len(row) for row in rows]).encode())
    for row in rows:
        digest.update(row.ids.tobytes())
        digest.update(row.trained.tobytes())
    return digest.hexdigest()
