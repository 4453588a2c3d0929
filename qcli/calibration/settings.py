"""What a calibration reads, as data: the texts, and how they pass the model. No torch."""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qcli.errors import UsageError

DEFAULT_TOKENS = 128 * 2048  # GPTQ's own number (arXiv:2210.17323, section 4)
GRADIENT_TOKENS = 32 * 1024  # whose gradients are taken where --tokens does not say: hidden states of all blocks wait for them
ORDERS = PARALLEL, SEQUENTIAL = "parallel", "sequential"  # the first in half of the time; what they gain is alike
FEWEST_TOKENS = 256  # that must reach a module before its statistics are used
SEGMENTS = 8  # of the batches of a text, each summed by itself: so many workers of a cluster can take texts
CHECK_SHARE = 16  # one window of so many is held out for the check, and at most CHECK_TOKENS
CHECK_TOKENS = 8192


@dataclass(frozen=True)
class Calibration:
    """`text` is the path of a file, None the bundled text. `tokens` None takes what there is, up to DEFAULT_TOKENS.
    `sequence_length` None is the model's, up to 2048. `check` holds a part out. `order`: whether a block's inputs come from the
    blocks before it as they are rounded ("sequential") or as they were ("parallel"). `text_hash` is the SHA-256 of the text.
    `statistics` is a file to read statistics from, `save_statistics` one to write them to. `states_on_disk`: hidden states wait
    beside the output, since memory has no room for them."""

    text: str | None = None
    tokens: int | None = None
    sequence_length: int | None = None
    check: bool = True
    order: str = PARALLEL
    text_hash: str = ""
    statistics: str | None = None
    save_statistics: str | None = None
    states_on_disk: bool = False

    @property
    def identity(self) -> dict[str, object]:
        """What the result depends on."""
        return {
            "text": self.text_hash,
            "tokens": self.tokens,
            "sequence_length": self.sequence_length,
            "held_out": self.check,
            "order": self.order,
        }


def calibration_on(
    text: str | Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    check: bool = True,
    order: str = ORDERS[0],
    statistics: str | Path | None = None,
    save_statistics: str | Path | None = None,
) -> Calibration:
    """The calibration on a text. Raises UsageError where it cannot be read, and for options that do not go together."""
    if tokens is not None and tokens < 2:
        raise UsageError(f"--tokens is {tokens:,}, expected 2 or more")
    for name, file in (("--statistics", statistics), ("--save-statistics", save_statistics)):
        if file is not None and order != PARALLEL:
            raise UsageError(
                f"{name} is of the original model's activations, and order={order} needs those of rounded blocks",
                "Leave out one of the two.",
            )
    if statistics is not None and save_statistics is not None:
        raise UsageError("--statistics and --save-statistics were both given", "Copy the file instead.")
    files_ = (None if path is None else str(path) for path in (statistics, save_statistics))
    return Calibration(None if text is None else str(text), tokens, sequence_length, check, order, _hash(text), *files_)


def _hash(text: str | Path | None) -> str:
    if text is None:
        return hashlib.sha256(files("qcli").joinpath("data", "corpus.txt").read_bytes()).hexdigest()
    try:
        with Path(text).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as e:
        raise UsageError(f"cannot read the text from {text}: {e.strerror}", "Check --text.") from e
