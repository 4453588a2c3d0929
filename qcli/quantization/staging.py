"""Where an output grows: OUT.partial, with a journal of finished units, until it is whole and renamed to OUT.

A unit is journalled only after its data reached the disk, so whatever the journal names is there after a crash. The lock is
held on the folder itself and dies with the process. Several threads may write and finish units.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from qcli.errors import CheckpointError, PlanError
from qcli.files.foreign_json import Kind, Required, check, is_number, parse_object, read_object, whole
from qcli.files.whole import sync_folder, write_file
from qcli.methods.errors import ErrorSums
from qcli.quantization.plan import Shard, Work
from qcli.sizes import format_bytes

SYNC_BYTES = 256_000_000  # data written between two syncs, at most
SYNC_SECONDS = 3.0  # what a crash may cost

_STATE = ".qcli"  # the folder inside OUT.partial that never reaches OUT
_JOURNAL = "journal.jsonl"
_PLAN = "plan.json"
_ANEW = "Delete the folder to start anew."
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


class Staging:
    """The staged output of one plan. Use as a context manager; leaving it syncs what is finished and drops the lock."""

    def __init__(self, plan: Staged, *, overwrite: bool = False):
        self.plan, self.overwrite = plan, overwrite
        self.final = plan.output
        self.folder = self.final.with_name(self.final.name + ".partial")
        self.replaced = self.final.with_name(self.final.name + ".replaced")
        self._aside = self.final.with_name(self.final.name + ".journal")
        self.done: dict[int, ErrorSums] = {}
        self._published = False
        self._files: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._waiting: list[tuple[int, ErrorSums]] = []
        self._unsynced, self._synced_at = 0, time.monotonic()
        self._noting, self._syncing = threading.Lock(), threading.Lock()
        self._failed: CheckpointError | None = None

    @property
    def state(self) -> Path:
        """What is in it goes on with the run, and never reaches OUT."""
        return self.folder / _STATE

    @property
    def downloads(self) -> Path:
        """Where source shards may lie while they are read."""
        return self.state / "source"

    def __enter__(self) -> "Staging":
        if self.replaced.exists() and not self.final.exists():
            os.rename(self.replaced, self.final)  # a run was killed while it swapped folders
        if self._aside.exists():  # or just before or after its last rename
            if self.folder.exists():
                os.rename(self._aside, self.folder / _STATE)
            else:
                shutil.rmtree(self._aside)
        if self.final.exists() and not self.overwrite:
            raise exists_error(self.final)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise CheckpointError(
                f"{self.folder} is in use by another qcli", "Wait for it to finish, or choose another --output."
            ) from None
        try:
            self._resume_or_start()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            if not self._published:
                self.sync()
        finally:
            for fd in self._files.values():
                os.close(fd)
            os.close(self._lock)

    def _resume_or_start(self) -> None:
        state = self.folder / _STATE
        if (state / _PLAN).exists():
            self._check_same_plan(read_object(state / _PLAN, str(state / _PLAN), _ANEW))
            self._read_journal()
        elif any(p.name != _STATE for p in self.folder.iterdir()):
            raise CheckpointError(
                f"{self.folder} exists and holds no journal of a qcli run", "Delete or move it, or choose another --output."
            )
        else:
            state.mkdir(exist_ok=True)
            write_file(state / _PLAN, json.dumps(self.plan.identity, indent=2).encode())
            sync_folder(state)
        self._journal = os.open(state / _JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._files[_JOURNAL] = self._journal

    def _check_same_plan(self, theirs: dict[str, object]) -> None:
        ours = json.loads(json.dumps(self.plan.identity))
        different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
        if len(different) > 1 and "output headers" in different:
            different.remove("output headers")  # follows from the others
        if different:
            problems = [f"its {key} was {_short(theirs.get(key))}, this run's is {_short(ours.get(key))}" for key in different]
            raise PlanError(
                f"{self.folder} was started by a run that differs",
                problems,
                "Rerun with the earlier options to go on, delete the folder to start anew, or choose another --output.",
            )

    def _read_journal(self) -> None:
        path = self.folder / _STATE / _JOURNAL
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # a line that a crash cut short is no promise
        for number, line in enumerate(whole.splitlines(), 1):
            label = f"{path}, line {number}"
            entry = parse_object(line, label, _ANEW)
            check(entry, _ENTRY, label, _ANEW)
            if entry["unit"] >= len(self.plan.work):
                raise CheckpointError(f"{label}: unit is {entry['unit']}, of {len(self.plan.work)}", _ANEW)
            self.done[entry["unit"]] = ErrorSums(entry["squared_error"], entry["squared_norm"], entry["nonfinite"])
        if len(whole) != len(data):
            os.truncate(path, len(whole))

    def begin_anew(self) -> None:
        """Drops all that the journal says is done: every unit is to be written again."""
        self.sync()
        self.done.clear()
        os.ftruncate(self._journal, 0)

    def open_shards(self) -> None:
        """Makes every file of the plan at its full size, so that a disk too small is found now.

        Raises CheckpointError.
        """
        for shard in self.plan.shards:
            path = self.folder / shard.name
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._files[shard.name] = fd
            try:
                _allocate(fd, shard.size)
                os.ftruncate(fd, shard.size)
                self._pwrite(fd, shard.header, 0)
            except OSError as e:
                raise self._full(e, shard.name) from e
            self._dirty.add(shard.name)

    def write(self, file: str, offset: int, data: bytes | memoryview) -> None:
        """Writes `data` (bytes-like) at `offset` of `file`."""
        try:
            self._pwrite(self._files[file], data, offset)
        except OSError as e:
            raise self._full(e, file) from e
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
            raise self._full(e, file) from e
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
                self._failed = self._full(e, _JOURNAL)
                raise self._failed from e
            self.done.update(waiting)
            self._synced_at = time.monotonic()

    def add_file(self, name: str, data: bytes) -> None:
        """Writes a small file whole, into a subfolder where its name has one. Raises CheckpointError."""
        try:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / name, data)
        except OSError as e:
            raise self._full(e, name) from e

    def publish(self) -> None:
        """Drops the journal and renames OUT.partial to OUT; what stood there before goes only then."""
        for name in list(self._files):
            os.close(self._files.pop(name))
        self._published = True
        shutil.rmtree(self.downloads, ignore_errors=True)
        os.rename(self.folder / _STATE, self._aside)
        sync_folder(self.folder)
        if self.final.exists():
            shutil.rmtree(self.replaced, ignore_errors=True)
            os.rename(self.final, self.replaced)
        os.rename(self.folder, self.final)
        sync_folder(self.final.parent)
        shutil.rmtree(self._aside)
        shutil.rmtree(self.replaced, ignore_errors=True)

    def _pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        while len(view):
            written = os.pwrite(fd, view, offset)
            view, offset = view[written:], offset + written

    def _full(self, error: OSError, file: str) -> CheckpointError:
        kept = "Finished work is kept: {} and run the same command again."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(self.folder).free
            return CheckpointError(
                f"the disk is full: {file} in {self.folder} needs {format_bytes(self.plan.output_bytes)} in all, "
                f"{format_bytes(free)} are free",
                kept.format("free some space"),
            )
        return CheckpointError(f"cannot write {self.folder / file}: {error.strerror}", kept.format("mend that"))


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def exists_error(final: Path) -> CheckpointError:
    """The refusal to touch an output that is there."""
    return CheckpointError(f"{final} exists already", "Pass --overwrite to replace it, or choose another --output.")


def _allocate(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise  # a file system that cannot reserve space is found full only while writing


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
