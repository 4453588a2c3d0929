"""Where an output grows: OUT.partial, until it is whole and renamed to OUT.

The lock is held on the folder itself and dies with the process. On file systems that lock files alone, as NFS, it is held on a file
in the folder.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

from qcli.errors import CheckpointError, PlanError
from qcli.files.foreign_json import read_object
from qcli.files.whole import sync_folder, write_file
from qcli.quantization.shard_files import ANEW, STATE, ShardFiles, Staged

PLAN = "plan.json"
_LOCK = "lock"


class Staging(ShardFiles):
    """The staged output of one plan. Use as a context manager; leaving it syncs what is finished and drops the lock."""

    def __init__(self, plan: Staged, *, overwrite: bool = False):
        final = plan.output
        super().__init__(plan, final.with_name(final.name + ".partial"))
        self.final, self.overwrite = final, overwrite
        self.replaced = final.with_name(final.name + ".replaced")
        self._aside = final.with_name(final.name + ".journal")
        self._published = False

    @property
    def downloads(self) -> Path:
        """Where source shards may lie while they are read."""
        return self.state / "source"

    def __enter__(self) -> "Staging":
        if self.replaced.exists() and not self.final.exists():
            os.rename(self.replaced, self.final)  # a run was killed while it swapped folders
        if self._aside.exists():  # or just before or after its last rename
            if self.folder.exists():
                os.rename(self._aside, self.state)
            else:
                shutil.rmtree(self._aside)
        if self.final.exists() and not self.overwrite:
            raise exists_error(self.final)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = _locked(self.folder)
        except BlockingIOError:
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
            self.close()
            os.close(self._lock)

    def _resume_or_start(self) -> None:
        state = self.state
        if (state / PLAN).exists():
            self._check_same_plan(read_object(state / PLAN, str(state / PLAN), ANEW))
            self.read_journals()
        elif any(p.name != STATE for p in self.folder.iterdir()):
            raise CheckpointError(
                f"{self.folder} exists and holds no journal of a qcli run", "Delete or move it, or choose another --output."
            )
        else:
            state.mkdir(exist_ok=True)
            write_file(state / PLAN, json.dumps(self.plan.identity, indent=2).encode())
            sync_folder(state)
        self.open_journal()

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

    def add_file(self, name: str, data: bytes) -> None:
        """Writes a small file whole, into a subfolder where its name has one. Raises CheckpointError."""
        try:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / name, data)
        except OSError as e:
            raise self.cannot_write(e, name) from e

    def drop(self) -> None:
        """Removes OUT.partial: what it was for stands elsewhere."""
        self.close()
        self._published = True
        shutil.rmtree(self.folder)

    def publish(self) -> None:
        """Drops the journal and renames OUT.partial to OUT; what stood there before goes only then."""
        self.close()
        self._published = True
        shutil.rmtree(self.downloads, ignore_errors=True)
        os.rename(self.state, self._aside)
        sync_folder(self.folder)
        if self.final.exists():
            shutil.rmtree(self.replaced, ignore_errors=True)
            os.rename(self.final, self.replaced)
        os.rename(self.folder, self.final)
        sync_folder(self.final.parent)
        shutil.rmtree(self._aside)
        shutil.rmtree(self.replaced, ignore_errors=True)


def _locked(folder: Path) -> int:
    """A descriptor that holds the lock of `folder`. Raises BlockingIOError where another holds it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:
        os.close(fd)
    (folder / STATE).mkdir(exist_ok=True)
    fd = os.open(folder / STATE / _LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def exists_error(final: Path) -> CheckpointError:
    """The refusal to touch an output that is there."""
    return CheckpointError(f"{final} exists already", "Pass --overwrite to replace it, or choose another --output.")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
