"""Statistics in a file, so that many methods can be tried on texts that pass the model once.

A safetensors file. The tensors of modules that share statistics are "NUMBER.NAME", with the names of Statistics.tensors. The
metadata "qcli_statistics" is JSON: what they were gathered from, which modules were watched, which of them have the number, and a
checksum of every tensor. The header stands first and is known last, so its room is reserved, and filled up with spaces. Whether the
file is written or read, a block at a time is in memory.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qcli.calibration.gather import Gathered
from qcli.calibration.statistics import Statistics
from qcli.checkpoint import dtypes
from qcli.checkpoint.safetensors_file import read_header, read_into
from qcli.errors import CheckpointError, QcliError
from qcli.files.foreign_json import parse_object
from qcli.files.whole import check_place, sync_folder

_KEY = "qcli_statistics"
_ROOM = 2048  # bytes of the header for a module, and as many for the rest
_AGAIN = "Gather them again with --save-statistics."


class StatisticsWriter:
    """Writes `path`, whole or not at all. `stated` says what the statistics are of. Use as a context manager: without an error in
    it the file is finished at its end. Raises QcliError where it cannot be written."""

    def __init__(self, path: Path, stated: Mapping[str, Any], modules: int):
        check_place(path)
        self.path, self._stated, self._temporary = path, stated, path.with_name(path.name + ".tmp")
        self._room, self._end = _ROOM * (modules + 1), 0
        self._entries: dict[str, dict] = {}
        self._groups: list[tuple[str, ...]] = []
        self._watched: list[str] = []
        self._sums: dict[str, int] = {}

    def __enter__(self) -> "StatisticsWriter":
        self._checked(self._open)
        return self

    def _open(self) -> None:
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self._checked(self._finish)
        finally:
            os.close(self._fd)
            self._temporary.unlink(missing_ok=True)

    def add(self, gathered: Gathered) -> None:
        """Writes the statistics of a block. Their Hessians must be symmetric."""
        self._watched += gathered.names
        for group in gathered.groups:
            number = len(self._groups)
            self._groups.append(group)
            for name, tensor in gathered.found[group[0]].tensors().items():
                flat = tensor.cpu().contiguous().reshape(-1)
                data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
                self._sums[f"{number}.{name}"] = zlib.crc32(data)
                self._entries[f"{number}.{name}"] = {
                    "dtype": dtypes.CODES[str(tensor.dtype).removeprefix("torch.")],
                    "shape": list(tensor.shape),
                    "data_offsets": [self._end, self._end + len(data)],
                }
                self._checked(lambda data=data: self._write(data, 8 + self._room + self._end))
                self._end += len(data)

    def _finish(self) -> None:
        own = {"of": self._stated, "modules": self._watched, "groups": self._groups, "checksums": self._sums}
        header = json.dumps({"__metadata__": {_KEY: json.dumps(own)}} | self._entries).encode()
        assert len(header) <= self._room
        self._write(memoryview(self._room.to_bytes(8, "little") + header.ljust(self._room)), 0)
        os.fsync(self._fd)
        os.rename(self._temporary, self.path)
        sync_folder(self.path.absolute().parent)

    def _write(self, data: memoryview, offset: int) -> None:
        while len(data):
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written

    def _checked(self, write: Any) -> None:
        try:
            write()
        except OSError as e:
            raise QcliError(f"{self.path} cannot be written: {e.strerror}", "Choose another place for --save-statistics.") from e


class StoredStatistics:
    """The statistics of a file. `of` says what they were gathered from. Raises CheckpointError where it is none or damaged."""

    def __init__(self, path: Path):
        self.path, self.header = path, read_header(path)
        if _KEY not in self.header.metadata:
            raise CheckpointError(f"{path} holds no statistics of qcli", "Give a file that --save-statistics wrote.")
        own = parse_object(self.header.metadata[_KEY].encode(), f"{path}: {_KEY}", _AGAIN)
        try:
            self.of: dict[str, Any] = dict(own["of"])
            self._modules = set(own["modules"])
            self._numbers = {name: number for number, group in enumerate(own["groups"]) for name in group}
            self._sums: dict[str, int] = dict(own["checksums"])
        except (KeyError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: {_KEY} is not what qcli writes", _AGAIN) from e

    def difference(self, stated: Mapping[str, Any]) -> str | None:
        """What the statistics were gathered from otherwise than `stated`, in a sentence."""
        for name, ours in stated.items():
            theirs = self.of.get(name)
            if theirs != ours and name in ("model", "text"):
                return f"{self.path} was gathered from another {name}"
            if theirs != ours:
                return f"{self.path} was gathered with {name} {theirs}, and this run has {ours}"
        return None

    def check(self, stated: Mapping[str, Any]) -> None:
        """Raises CheckpointError where there is a difference."""
        if found := self.difference(stated):
            raise CheckpointError(found, _AGAIN)

    def missing(self, modules: Sequence[str]) -> list[str]:
        """Those of `modules` that were not watched."""
        return [name for name in modules if name not in self._modules]

    def gathered(self, modules: Mapping[str, int], device: torch.device) -> Gathered:
        """The statistics of modules, which are given with their in_features. Those that no token reached have none."""
        found: dict[int, Statistics] = {}
        for name, in_features in modules.items():
            number = self._numbers.get(name)
            if number is not None and number not in found:
                found[number] = self._read(number, in_features, device)
        return Gathered(modules, {name: found[self._numbers[name]] for name in modules if name in self._numbers})

    def _read(self, number: int, in_features: int, device: torch.device) -> Statistics:
        tensors = {}
        fd = os.open(self.path, os.O_RDONLY)
        try:
            for info in self.header.tensors.values():
                owner, _, name = info.name.partition(".")
                if owner != str(number):
                    continue
                data = bytearray(info.nbytes)
                read_into(fd, info.start, memoryview(data))
                if zlib.crc32(data) != self._sums.get(info.name):
                    raise CheckpointError(f"{self.path} is damaged: {info.name} has another checksum", _AGAIN)
                tensor = torch.frombuffer(data, dtype=dtypes.torch_dtype(info.dtype)) if data else torch.empty(0)
                tensors[name] = tensor.view(info.shape).to(device)
        finally:
            os.close(fd)
        try:
            fits = all(tensors[name].shape == (in_features,) for name in ("square", "magnitude", "absmax"))
            found = Statistics.of(tensors)
        except (KeyError, ValueError) as e:
            raise CheckpointError(f"{self.path} is damaged: statistics {number} lack {e}", _AGAIN) from e
        if not fits:
            raise CheckpointError(f"{self.path} is damaged: statistics {number} are not of {in_features:,} channels", _AGAIN)
        return found
