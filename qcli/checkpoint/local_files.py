"""Files of a folder on this machine: a user's model, or a model's snapshot in the user's hub cache. Nothing is ever deleted."""

import os
from collections.abc import Sequence
from pathlib import Path


class LocalFiles:
    """`names` are relative to `path`. A hub snapshot has a `revision`; its files are links to blobs named by their hash."""

    stream = False

    def __init__(self, path: Path, name: str, revision: str | None = None):
        self.path, self.name, self.revision = path, name, revision
        self.is_hub = revision is not None
        self.names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())

    def size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def hash(self, name: str) -> str | None:
        return (self.path / name).resolve().name if self.is_hub else None

    def local(self, name: str) -> Path:
        return self.path / name

    def weights(self, name: str) -> Path:
        return self.path / name

    def parts(self, name: str, parts: Sequence[tuple[int, int]]) -> Path:
        """A file with at least these bytes (start, end) of `name` at their places."""
        return self.weights(name)

    def read(self, name: str, offset: int, count: int) -> bytes:
        with open(self.path / name, "rb") as file:
            file.seek(offset)
            return file.read(count)

    def read_ahead(self, names: list[str]) -> None:
        """Asks the system to read the weight files into its cache meanwhile. Does nothing where it cannot be asked."""
        if not hasattr(os, "posix_fadvise"):
            return
        for name in names:
            try:
                with open(self.path / name, "rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            except OSError:  # whoever reads it tells
                return

    def release(self, name: str) -> None:
        """Does nothing: the file stays."""

    def download_to(self, folder: Path, parts: bool = False) -> None:
        """Does nothing: there is nothing to fetch."""

    def download_bytes(self, volume: Path, names: list[str]) -> int:
        return 0
