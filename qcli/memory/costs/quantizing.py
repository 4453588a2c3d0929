"""What `qcli quantize` would take for a model: memory, disk, and time at the measured rates of this machine's disk."""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qcli.errors import QcliError, UsageError
from qcli.formats import misfit, written
from qcli.memory.costs.weights import ITEMSIZE, method_of, weights
from qcli.memory.model.opening import Model
from qcli.memory.model.tensor_rules import Parameter
from qcli.schemes import CHUNK_BYTES, CHUNKS_IN_WORK, NAMED

_SAMPLE = 32 << 20  # bytes read and written to measure a rate


@dataclass(frozen=True)
class Quantizing:
    """Bytes and seconds of one run. `memory` is an upper estimate, above Python and its libraries. `read_rate` and `write_rate` are
    bytes a second, measured here. `seconds` leave out the download."""

    method: str
    memory: int
    disk: int
    download: int
    read_rate: float
    write_rate: float
    seconds: float


def quantizing(model: Model, folder: Path) -> list[Quantizing]:
    """The estimate for each method that `qcli quantize` can use for `model`, written to `folder`.

    It takes about a second, because the disk is measured.

    Reading, quantizing and writing overlap, and the disk limits the whole. Measured over 7.9 GB, a run takes 0.96 times as long as
    reading the source once and then writing the result. Raises UsageError for a model that is quantized already, QcliError where
    `folder` cannot be written.
    """
    if model.config.quantization:
        raise UsageError(f"{model.label} is quantized already, and --quantizing was given", "Leave out --quantizing.")
    dtype = model.config.dtype if model.config.dtype in ITEMSIZE else "bfloat16"
    source = model.file_bytes or weights(model.parameters, dtype).stored
    read, write = _rates(model.files, folder)
    found = []
    for method in written():
        if refusal(model.parameters, method) is not None:
            continue
        stored = weights(model.parameters, method, dtype).stored
        made = [(p, name) for p in model.parameters if (name := method_of(p, method)) is not None]
        held = (NAMED[name].held_bytes(p.out_features, p.in_features) for p, name in made)
        found.append(
            Quantizing(
                method=method,
                memory=max(held, default=0) + CHUNKS_IN_WORK * CHUNK_BYTES,
                disk=stored,
                download=0 if model.files else source,
                read_rate=read,
                write_rate=write,
                seconds=source / read + stored / write,
            )
        )
    return found


def refusal(parameters: Sequence[Parameter], method: str) -> str | None:
    """Why `qcli quantize` refuses `method` for these parameters, as a sentence without its end; None where it does not."""
    for one in parameters:
        name = method_of(one, method)
        if name is not None and (reason := misfit(NAMED[name], one.out_features, one.in_features)):
            return f"qcli quantize refuses {method} for {one.name}: {reason}"
    return None


def refusals(model: Model) -> list[str]:
    """The `refusal` of each method that `quantizing` leaves out."""
    return [reason for method in written() if (reason := refusal(model.parameters, method)) is not None]


def _rates(files: list[Path], folder: Path) -> tuple[float, float]:
    """Bytes a second, read and written.

    Reading is measured on the largest of `files`. Without files it is measured on what was just written, after that was dropped
    from memory. Writing is measured on a nameless file in `folder`, until the disk confirms it.
    """
    piece = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as sample:
            started = time.perf_counter()
            for _ in range(_SAMPLE // len(piece)):
                sample.write(piece)
            sample.flush()
            os.fsync(sample.fileno())
            write = _SAMPLE / (time.perf_counter() - started)
            if not files:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(sample.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                return _read_rate(sample.fileno()), write
    except OSError as e:
        raise QcliError(f"{folder} cannot be written: {e.strerror}", "Run it in the folder of the future result.") from e
    with open(max(files, key=lambda path: path.stat().st_size), "rb", buffering=0) as file:
        return _read_rate(file.fileno()), write


def _read_rate(fd: int) -> float:
    """Bytes a second from the middle of a file."""
    offset = max(0, os.fstat(fd).st_size // 2 - _SAMPLE // 2)
    started = time.perf_counter()
    count = len(os.pread(fd, _SAMPLE, offset))
    return count / (time.perf_counter() - started)
