"""safetensors files: headers are checked in full before they are trusted; data are read by pread into reused buffers.

Layout: 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data. Why not mmap: mapped pages
would count as this process's memory, reads into one buffer do not.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from qcli.checkpoint.dtypes import DTYPE_BITS
from qcli.errors import CheckpointError
from qcli.files.foreign_json import TEXT, Required, check, list_of, map_of, one_of, parse_object, shown, whole

MAX_HEADER = 100_000_000  # bytes, the format's own limit
FIRST_READ = 100_000  # bytes; nearly every header fits
DAMAGED = "The file is damaged or its download was cut short: fetch it again."


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in a header. Its data are the bytes `start` to `end` of the weight file `file`, whose name is relative to
    the checkpoint. `dtype` is a safetensors code."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The tensors of a file in the order of their data; `raw` is the header's JSON as stored."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    raw: bytes


def read_header(path: Path) -> Header:
    """The header of a local file. Raises CheckpointError."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}", "Check its permissions.") from e
    try:
        size = os.fstat(fd).st_size
        return read_header_with(lambda offset, count: os.pread(fd, count, offset), path.name, size, str(path))
    except OSError as e:
        raise CheckpointError(f"cannot read {path}: {e.strerror}", "Check the file and its disk.") from e
    finally:
        os.close(fd)


def read_header_with(read: Callable[[int, int], bytes], file: str, file_size: int, label: str, hint: str = DAMAGED) -> Header:
    """The header of `file`, which has `file_size` bytes. `read(offset, count)` gives its bytes.

    Messages call the file `label`; `hint` says what to do about a damaged file. Raises CheckpointError.
    """
    if file_size < 8:
        raise CheckpointError(f"{label}: {file_size} bytes, expected at least the 8 of a header length", hint)
    head = read(0, min(FIRST_READ, file_size))
    length = int.from_bytes(head[:8], "little")
    if length < 2 or length > MAX_HEADER:
        raise CheckpointError(
            f"{label}: the header claims {length:,} bytes, expected 2 to {MAX_HEADER:,}", "This is not a safetensors file."
        )
    if 8 + length > file_size:
        raise CheckpointError(f"{label}: the header claims {length:,} bytes, the whole file has {file_size:,}", hint)
    if len(head) < 8 + length:
        head += read(len(head), 8 + length - len(head))
    if len(head) < 8 + length:
        raise CheckpointError(f"{label}: read {len(head):,} bytes of a header of {8 + length:,}", hint)
    raw = bytes(head[8 : 8 + length])
    return parse_header(raw, file, file_size, label, hint)


def parse_header(raw: bytes, file: str, file_size: int, label: str, hint: str = DAMAGED) -> Header:
    """Checks the header JSON `raw` of a file of `file_size` bytes. Raises CheckpointError at the first fault."""
    entries = parse_object(raw, f"{label}: the header", hint, unique=True)
    check(entries, {"__metadata__": map_of(TEXT)}, f"{label}: the header", hint)
    metadata = entries.pop("__metadata__", None) or {}
    data_start = 8 + len(raw)
    data_size = file_size - data_start
    found = (_entry(file, f"{label}: tensor {name}", name, entry, data_start, data_size, hint) for name, entry in entries.items())
    tensors = sorted(found, key=_place)
    position = data_start
    previous = None
    for tensor in tensors:
        if tensor.start < position:
            raise CheckpointError(f"{label}: the tensors {previous} and {tensor.name} overlap", hint)
        if tensor.start > position:
            raise CheckpointError(f"{label}: {tensor.start - position:,} bytes before {tensor.name} belong to no tensor", hint)
        position, previous = tensor.end, tensor.name
    if position != file_size:
        raise CheckpointError(f"{label}: {file_size - position:,} bytes after the last tensor belong to none", hint)
    return Header({t.name: t for t in tensors}, metadata, raw)


def _place(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.start, tensor.end


_ENTRY = {
    "dtype": Required(one_of(*DTYPE_BITS)),
    "shape": Required(list_of(whole())),
    "data_offsets": Required(list_of(whole(), 2)),
}


def _entry(file: str, label: str, name: str, entry: object, data_start: int, data_size: int, hint: str) -> TensorInfo:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{label}: {what}", hint)

    if not isinstance(entry, dict):
        raise wrong(f"its entry is {shown(entry)}, expected an object")
    check(entry, _ENTRY, label, hint)
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if start > end:
        raise wrong(f"its data ends ({end:,}) before it begins ({start:,})")
    if end > data_size:
        raise wrong(f"its data ends at byte {end:,}, the file holds {data_size:,} bytes of data")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or bits // 8 != end - start:
        raise wrong(f"{dtype} of shape {shape} takes {bits // 8:,} bytes, its data has {end - start:,}")
    return TensorInfo(file, name, dtype, tuple(shape), data_start + start, data_start + end)


def build_header(specs: list[tuple[str, str, tuple[int, ...]]], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """(the first bytes of a file, each tensor's start counted from the file's beginning). `specs` are (name, dtype, shape) of the
    tensors, in the order of their data. The JSON is padded with blanks to a multiple of 8 bytes, as the safetensors library does.
    """
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, dtype, shape in specs:
        end = position + prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + entries[name]["data_offsets"][0] for name, _, _ in specs}
    return header, starts


def read_into(fd: int, offset: int, view: memoryview) -> None:
    """Fills `view` from byte `offset` of `fd`. Raises CheckpointError where the file ends too early or the disk fails."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as e:
            raise CheckpointError(f"reading a weight file failed: {e.strerror}", "Check the disk, then rerun.") from e
        if count == 0:
            raise CheckpointError(f"a weight file ended at byte {offset + done:,}, {len(view) - done:,} too early", DAMAGED)
        done += count


def read_columns(fd: int, info: TensorInfo, first: int, last: int, view: memoryview) -> None:
    """Fills `view` with columns `first` to `last` of the 2-D tensor `info`, row after row."""
    rows, columns = info.shape
    itemsize = DTYPE_BITS[info.dtype] // 8
    if last - first == columns:
        read_into(fd, info.start, view)
        return
    width = (last - first) * itemsize
    for row in range(rows):
        read_into(fd, info.start + (row * columns + first) * itemsize, view[row * width : (row + 1) * width])
