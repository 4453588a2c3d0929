"""Writes a result file completely or not at all."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from qcli.errors import QcliError


def check_place(path: Path) -> None:
    """Raises QcliError if no file can be at `path`: its folder is missing, or it is a folder itself."""
    if path.is_dir():
        raise QcliError(f"{path} is a folder, not a file", "Name a file in it.")
    if not path.parent.is_dir():
        raise QcliError(f"{path} cannot be written: there is no folder {path.parent}", f"mkdir -p {path.parent}")


def csv_bytes(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """The lines of a CSV file, UTF-8; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, then renames it: other processes see the old file or the whole new one.

    Raises QcliError if it cannot be written. The old file then stays.
    """
    check_place(path)
    try:
        write_file(path, data)
    except OSError as error:
        raise QcliError(f"{path} cannot be written: {error.strerror}") from error


def write_file(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Writes a temporary file, syncs it and renames it. Its mode follows the umask. A write that fails leaves nothing behind.
    `data` may be made piece by piece."""
    temporary = path.with_name(path.name + ".tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            for piece in (data,) if isinstance(data, bytes) else data:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Syncs the folder `path`, so that renames in it are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
