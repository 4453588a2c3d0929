"""The weight files of an output that grows: data at planned offsets, and a journal of finished units.

A unit is journalled only after its data reached the disk, so whatever the journal names is there after a crash. Several threads may
write and finish units. Several processes may too, each with a journal of its own, where each has other files.
"""

import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from qcli.errors import CheckpointError
from qcli.files.foreign_json import Kind, Required, check, is_number, parse_object, whole
from qcli.methods.errors import ErrorSums
from qcli.quantization.plan import Shard, Work
from qcli.sizes import format_bytes

SYNC_BYTES = 256_000_000  # data written between two syncs, at most
SYNC_SECONDS = 3.0  # what a crash may cost

STATE = ".qcli"  # the folder inside OUT.partial that never reaches OUT
ANEW = "Delete the folder to start anew."
JOURNAL = "journal.jsonl"
_SUM = Kind("a number", is_number)  # of a NaN that was allowed, too
_ENTRY = {
    "unit": Required(whole()),
    "squared_error": Required(_SUM),
    "squared_norm": Required(_SUM),
    "nonfinite": Required(whole()),
}


class Staged(Protocol):
    """What a folder is staged for, as a Plan is: where it comes to stand, what tells it from other runs (JSON), the bytes of its
    weights, and the units of work and shards that are planned in it."""

    @property
    def output(self) -> Path: ...
    @property
    def identity(self) -> Mapping[str, object]: ...
    @property
    def output_bytes(self) -> int: ...
    @property
    def work(self) -> Sequence[Work]: ...
    @property
    def shards(self) -> Sequence[Shard]: ...


class Sink(Protocol):
    """What takes the parts of weights, as ShardFiles does."""

    def write(self, file: str, offset: int, data: bytes | memoryview) -> None: ...
    def write_rows(self, file: str, offset: int, data: memoryview, row: int, stride: int) -> None: ...
    def finish_work(self, index: int, errors: ErrorSums) -> None: ...


class ShardFiles:
    """The weight files of `plan` in `folder`. `open_journal` comes first, then `open_shards`. `done` has the errors of the units
    that are known to be there."""

    def __init__(self, plan: Staged, folder: Path):
        self.plan, self.folder = plan, folder
        self.done: dict[int, ErrorSums] = {}
        self._files: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._waiting: list[tuple[int, ErrorSums]] = []
        self._unsynced, self._synced_at = 0, time.monotonic()
        self._noting, self._syncing = threading.Lock(), threading.Lock()
        self._failed: CheckpointError | None = None

    @property
    def state(self) -> Path:
        """What is in it goes on with the run, and never reaches OUT."""
        return self.folder / STATE

    def open_journal(self, name: str = JOURNAL) -> None:
        """Opens the journal of that name in `state`, to which finished units are added. Raises CheckpointError."""
        try:
            self._journal = os.open(self.state / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as e:
            raise self.cannot_write(e, name) from e
        self._files[name] = self._journal

    def close(self) -> None:
        """Closes all files, without a sync."""
        for name in list(self._files):
            os.close(self._files.pop(name))

    def read_journals(self) -> None:
        """Takes into `done` what the journals in `state` say, whoever wrote them. Raises CheckpointError for a damaged one."""
        for path in self._journals():
            data = path.read_bytes()
            complete = data[: data.rfind(b"\n") + 1]  # a line that a crash cut short is no promise
            for number, line in enumerate(complete.splitlines(), 1):
                label = f"{path}, line {number}"
                entry = parse_object(line, label, ANEW)
                check(entry, _ENTRY, label, ANEW)
                if entry["unit"] >= len(self.plan.work):
                    raise CheckpointError(f"{label}: unit is {entry['unit']}, of {len(self.plan.work)}", ANEW)
                self.done[entry["unit"]] = ErrorSums(entry["squared_error"], entry["squared_norm"], entry["nonfinite"])
            if path.name == JOURNAL and len(complete) != len(data):
                os.truncate(path, len(complete))

    def _journals(self) -> list[Path]:
        return sorted(self.state.glob(f"{Path(JOURNAL).stem}*.jsonl"))

    def begin_anew(self) -> None:
        """Drops all that the journal says is done: every unit is to be written again."""
        self.sync()
        self.done.clear()
        os.ftruncate(self._journal, 0)
        for path in self._journals():
            if path.name != JOURNAL:
                path.unlink()

    def open_shards(self, names: Collection[str] | None = None) -> None:
        """Makes the files of these names at their full size, so that a disk too small is found now; None is all of the plan.

        Raises CheckpointError.
        """
        for shard in self.plan.shards:
            if (names is not None and shard.name not in names) or shard.name in self._files:
                continue
            path = self.folder / shard.name
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._files[shard.name] = fd
            try:
                _allocate(fd, shard.size)
                os.ftruncate(fd, shard.size)
                self._pwrite(fd, shard.header, 0)
            except OSError as e:
                raise self.cannot_write(e, shard.name) from e
            self._dirty.add(shard.name)

    def write(self, file: str, offset: int, data: bytes | memoryview) -> None:
        """Writes `data` (bytes-like) at `offset` of `file`."""
        try:
            self._pwrite(self._files[file], data, offset)
        except OSError as e:
            raise self.cannot_write(e, file) from e
        self._note_written(file, len(data))

    def _note_written(self, file: str, count: int) -> None:
        with self._noting:
            self._dirty.add(file)
            self._unsynced += count
        if self._unsynced >= SYNC_BYTES:
            self.sync(lambda: self._unsynced >= SYNC_BYTES)

    def write_rows(self, file: str, offset: int, data: memoryview, row: int, stride: int) -> None:
        """Writes `data` in rows of `row` bytes, the first at `offset` of `file`, each `stride` bytes after the one before."""
        if row == stride:
            self.write(file, offset, data)
            return
        fd, flat = self._files[file], data.cast("B")
        try:
            for i, start in enumerate(range(0, len(flat), row)):
                if os.pwrite(fd, flat[start : start + row], offset + i * stride) < row:
                    self._pwrite(fd, flat[start : start + row], offset + i * stride)
        except OSError as e:
            raise self.cannot_write(e, file) from e
        self._note_written(file, len(flat))

    def finish_work(self, index: int, errors: ErrorSums) -> None:
        """Notes that every output of the work `index` is written."""
        with self._noting:
            self._waiting.append((index, errors))
        if self._is_due():
            self.sync(self._is_due)

    def _is_due(self) -> bool:
        return self._unsynced >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS

    def sync(self, still: Callable[[], bool] = lambda: True) -> None:
        """Brings written data to the disk, then the journal entries that speak of it; unless, after another thread's sync
        has ended, it is needed no more."""
        with self._syncing:
            if self._failed:  # data that a sync lost may not be lost a second time: nothing more is promised
                raise self._failed
            if not still():
                return
            with self._noting:  # others go on writing: what they add is the next sync's
                dirty, self._dirty = self._dirty, set()
                waiting, self._waiting = self._waiting, []
                self._unsynced = 0
            try:
                for file in sorted(dirty):
                    os.fdatasync(self._files[file])
                if waiting:
                    lines = "".join(json.dumps({"unit": index, **vars(errors)}, allow_nan=True) + "\n" for index, errors in waiting)
                    _write_all(self._journal, lines.encode())
                    os.fdatasync(self._journal)
            except OSError as e:
                self._failed = self.cannot_write(e, JOURNAL)
                raise self._failed from e
            self.done.update(waiting)
            self._synced_at = time.monotonic()

    def cannot_write(self, error: OSError, file: str) -> CheckpointError:
        """The error to raise for one that the system gave in writing `file`."""
        kept = "Finished work is kept: {} and run the same command again."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.folder).free
            return CheckpointError(
                f"the disk is full: {file} in {self.folder} needs {format_bytes(self.plan.output_bytes)} in all, "
                f"{format_bytes(free)} are free",
                kept.format("free some space"),
            )
        return CheckpointError(f"cannot write {self.folder / file}: {error.strerror}", kept.format("mend that"))

    def _pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise  # a file system that cannot reserve space is found full only while writing
