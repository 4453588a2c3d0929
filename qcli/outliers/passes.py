"""The passes of a text through a model on this machine. qcli.outliers.on_cluster divides them over others."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcli.errors import UsageError
from qcli.evaluation.tokens import TokenScores
from qcli.outliers.ablation import Zeroed, Zeroing, ablate
from qcli.outliers.measure import Asked, measure
from qcli.outliers.measured import Measured
from qcli.process import available_memory
from qcli.progress import Bar, NoBar
from qcli.sizes import format_bytes
from qcli.streaming.corpus import Window
from qcli.streaming.reading import Reading, hidden_bytes, weight_bytes
from qcli.streaming.skeleton import Skeleton


@dataclass(frozen=True)
class Opening:
    """How a model is opened, as plain data."""

    model: str
    dtype: str
    device: str
    revision: str | None
    trust_remote_code: bool

    def skeleton(self, attention: str | None = None) -> Skeleton:
        """The model; `attention` names transformers' implementation. Raises what Skeleton raises."""
        return Skeleton(
            self.model,
            dtype=self.dtype,
            device=self.device,
            attention=attention,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )

    def eager(self) -> Skeleton:
        """The model with transformers' attention that shows its probabilities."""
        return self.skeleton("eager")


class Passes:
    """Passes of all windows through a model that was opened as `skeleton`. `bar` shows them; each has `work` bytes for it."""

    def __init__(self, opening: Opening, skeleton: Skeleton, windows: Sequence[Window]):
        self._opening, self._skeleton, self._windows = opening, skeleton, windows
        self.work = Reading.work(skeleton)
        self.bar: Bar = NoBar()

    def check_room(self, variants: int) -> None:
        """Raises UsageError where the windows, in so many variants, have no room in memory."""
        check_room(self._skeleton, self._windows, variants, self._windows)

    def measure(self, asked: Asked) -> tuple[Measured, TokenScores]:
        """What all windows leave, and their scores. Raises NonFiniteError."""
        numbers = range(len(self._windows))
        return measure(self._skeleton, self._windows, numbers, asked, self.bar.advance, whole=True)

    def ablate(self, zeroing: Zeroing) -> Zeroed:
        """What zeroing does in all windows. Raises NonFiniteError."""
        return ablate(self._opening.eager(), self._windows, zeroing, self.bar.advance)


def check_room(skeleton: Skeleton, windows: Sequence[Window], variants: int, text: Sequence[Window], workers: int = 1) -> None:
    """Raises UsageError where the hidden states of these windows, which are some of a `text`, have no room in memory beside the
    largest block. So many `workers` share the memory of a machine; each has a GPU of its own."""
    shared = 1 if skeleton.device.type == "cuda" else workers
    free = torch.cuda.mem_get_info()[0] if skeleton.device.type == "cuda" else available_memory()
    states = hidden_bytes([skeleton], windows, variants)
    block = max(weight_bytes(unit) for unit in skeleton.units)
    if free is None or shared * (states + block) <= free:
        return
    free //= shared
    what = f"the hidden states of {_tokens(windows):,} tokens take {format_bytes(states)}, the largest block {format_bytes(block)}"
    among = f" for each of {shared} workers" if shared > 1 else ""
    fewer = _tokens(text) * max(free - block, 0) // (2 * states)
    raise UsageError(
        f"{what}, and {format_bytes(free)} of memory are free{among}",
        f"Read fewer: --tokens {fewer}." if fewer > 1 else "No choice of --tokens would do; free some memory.",
    )


def _tokens(windows: Sequence[Window]) -> int:
    return sum(len(window.ids) for window in windows)
