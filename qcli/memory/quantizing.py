"""What `qcli quantize` of a model would take: memory, disk, and time by the rates that this machine's disk shows."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from qcli.errors import QcliError

# The working memory of qcli.checkpoint.plan: chunks in work on several threads, with the float32 copies made of each.
_CHUNK_BYTES, _CHUNKS_IN_WORK = 1 << 20, 128
_BLOCK_SIZE, _PER_BLOCK, _PER_ROW = 64, 24, 8  # bytes that are kept of a weight until its last row is there
_SAMPLE = 32 << 20  # bytes read and written to measure a rate


@dataclass(frozen=True)
class Quantizing:
    """Bytes and seconds of one run. `memory` is above Python and its libraries, an upper estimate. `read_rate` and
    `write_rate` are bytes a second as measured here; `read_rate` is None, and the download not in `seconds`, for a model that is
    not on this machine."""

    method: str
    memory: int
    disk: int
    download: int
    read_rate: float | None
    write_rate: float
    seconds: float


def quantizing(
    method: str, largest: tuple[int, int], source_bytes: int, stored_bytes: int, files: list[Path], folder: Path
) -> Quantizing:
    """The estimate for `method`. `largest` is [out_features, in_features] of the largest linear weight, `stored_bytes` what the
    result takes on disk; `files` are the weight files where they are here, and the result goes to `folder`.

    Reading, quantizing and writing overlap, and the first and the last bound the whole: measured over 7.9 GB, a run takes 0.96
    times as long as reading the source once and then writing the result. Raises QcliError where `folder` cannot be written.
    """
    out_features, in_features = largest
    kept = _PER_ROW * out_features
    if method != "llm-int8":
        kept = _PER_BLOCK * -(-out_features * in_features // _BLOCK_SIZE)
    read, write = _read_rate(files), _write_rate(folder)
    seconds = stored_bytes / write + (source_bytes / read if read else 0)
    return Quantizing(
        method=method, memory=kept + _CHUNKS_IN_WORK * _CHUNK_BYTES, disk=stored_bytes,
        download=0 if files else source_bytes, read_rate=read, write_rate=write, seconds=seconds,
    )  # fmt: skip


def _read_rate(files: list[Path]) -> float | None:
    """Bytes a second from the largest file's middle, which a run of anything else has seldom left in memory."""
    if not files:
        return None
    file = max(files, key=lambda path: path.stat().st_size)
    fd = os.open(file, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        started = time.perf_counter()
        count = len(os.pread(fd, _SAMPLE, max(0, size // 2 - _SAMPLE // 2)))
        return count / max(time.perf_counter() - started, 1e-9) if count else None
    finally:
        os.close(fd)


def _write_rate(folder: Path) -> float:
    """Bytes a second into a file without a name that is gone when it is closed, with the disk's own confirmation."""
    data = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.perf_counter()
            for _ in range(_SAMPLE // len(data)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return _SAMPLE / (time.perf_counter() - started)
    except OSError as e:
        raise QcliError(f"{folder} cannot be written: {e.strerror}", "Run it where the result would go.") from e
