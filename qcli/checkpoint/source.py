"""Where a model is read from: one interface for a folder and for a hub repository. Opening reads headers, never weights."""

import hashlib
import json
import os
import re
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from qcli.checkpoint import carried, dtypes, torch_file, weight_files
from qcli.checkpoint import hub as hubs
from qcli.checkpoint.config_json import check_config, check_counts
from qcli.checkpoint.local_files import LocalFiles
from qcli.checkpoint.safetensors_file import DAMAGED, Header, TensorInfo, read_header_with
from qcli.errors import CheckpointError
from qcli.files.foreign_json import read_object
from qcli.process import available_memory

_CONNECTIONS = 8  # at a time: the largest models have two hundred shards, and each header costs a round trip
PIECE_BYTES = 4 << 20  # recommended size of a piece; on the hub each piece is one ranged request
_AHEAD = 4  # pieces requested at once, which hides the hub's latency
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def open_source(model: str, revision: str | None = None, *, stream: bool = False, trust_remote_code: bool = False) -> "Source":
    """The checkpoint in the folder `model`, or in the hub repository of that id at `revision`.

    Raises CheckpointError, HubError. Faults that still let the headers be read are listed in `Source.problems`.
    """
    return Source(open_place(model, revision, stream=stream), model, trust_remote_code)


def open_place(model: str, revision: str | None = None, *, stream: bool = False):
    """The files of the folder `model`, or of the hub repository of that id. Raises CheckpointError, HubError."""
    path = Path(model)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(f"{model} is a folder, so there is no revision {revision!r}", "Leave out --revision.")
        return LocalFiles(path, path.resolve().name or "model")
    if path.exists():
        raise CheckpointError(f"{model} is a file, expected a model's folder", "Give the folder that holds config.json.")
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise CheckpointError(f"there is no folder {model}, and it is not a hub id either", "Check the path, or write org/name.")
    return hubs.open_repository(model, revision, stream=stream)


class Source:
    """A checkpoint's headers, config and files. Every verb reads the model through it.

    `tensors` maps each name to its TensorInfo; `scales` those that `set_aside` took out of it, by what they belong to. `files`
    lists the weight files in reading order. `fingerprint` identifies the checkpoint by its headers, its config and the hub's own
    hashes. `problems` are faults that make the model load wrongly or not at all; `notes` are harmless oddities. Each is a sentence.
    """

    def __init__(self, place, label: str, trust_remote_code: bool):
        self.place, self.label = place, label
        self.name, self.revision, self.is_hub, self.stream = place.name, place.revision, place.is_hub, place.stream
        self.read_elsewhere = False  # whether other machines read the weights
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.config = self._config()
        self.config_folder = place.local("config.json").parent
        self.tensors: dict[str, TensorInfo] = {}
        self.scales: dict[str, TensorInfo] = {}
        self.headers: dict[str, Header] = {}
        self.files, self.index, notes = weight_files.find(place.names, self.json, self.label)
        self.notes += notes
        self._read_headers()
        self._check_index()
        self._check_scales()
        widest = max((max(info.shape, default=0) for info in self.tensors.values()), default=0)
        check_counts(self.config, len(self.tensors), widest, f"{label}/config.json")
        self.carried = carried.choose(place, self.files)
        self.trusted = trust_remote_code
        if trust_remote_code:
            for name in self.carried.files:
                if name.endswith(".py"):
                    place.local(name)

    def _config(self) -> dict:
        if "config.json" not in self.place.names:
            raise weight_files.no_config(self.place.names, self.label)
        config = self.json("config.json")
        check_config(config, f"{self.label}/config.json")
        return config

    def json(self, name: str) -> dict:
        """The object in the JSON file `name`, which is fetched if it is not here. Raises CheckpointError, HubError."""
        return read_object(self.place.local(name), f"{self.label}/{name}", self.again("Mend it, or fetch it again."))

    def again(self, otherwise: str = "Fetch the model again.") -> str:
        """What to do about a damaged file. On the hub, fetching it again would bring the same damaged file."""
        if self.is_hub:
            return "The repository itself holds this fault: ask its authors, or give another --revision."
        return otherwise

    @property
    def architectures(self) -> list[str]:
        """The class names that config.json states."""
        return self.config.get("architectures") or []

    @property
    def quantization(self) -> dict | None:
        """The `quantization_config` of a quantized checkpoint, else None."""
        return self.config.get("quantization_config") or None

    def set_aside(self, owners: Mapping[str, str]) -> None:
        """Takes tensors out of `tensors` that are no parameters of the model: scales, by their names, of the weights named."""
        for name, weight in owners.items():
            self.scales[weight] = self.tensors.pop(name)

    def _read_headers(self) -> None:
        with ThreadPoolExecutor(_CONNECTIONS if self.is_hub else 1) as pool:
            headers = list(pool.map(self._header, self.files))
        twice: dict[tuple[str, str], list[str]] = {}
        for file, header in zip(self.files, headers):
            self.headers[file] = header
            for name, info in header.tensors.items():
                if name in self.tensors and (self.index or {}).get(name) != file:
                    twice.setdefault((self.tensors[name].file, file), []).append(name)
                self.tensors[name] = info
        for (first, second), names in twice.items():
            verb = "is" if len(names) == 1 else "are"
            self.problems.append(f"{_counted(names, 'tensor')} {verb} in both {first} and {second}")
        if not self.tensors:
            raise CheckpointError(f"{self.label} holds no tensors", self.again())

    def _header(self, file: str) -> Header:
        label = f"{self.label}/{file}"
        if file.endswith(".safetensors"):
            return read_header_with(
                lambda offset, count: self.read(file, offset, count), file, self.place.size(file), label, self.again(DAMAGED)
            )
        return torch_file.read_header(self.place.weights(file), file, label)

    def read(self, file: str, offset: int, count: int) -> bytes:
        """`count` bytes of a weight file from byte `offset` on. On the hub this is a ranged request: the file is not fetched.

        Several threads may read at the same time. Raises HubError, and CheckpointError, also where the file ends too early.
        """
        try:
            data = self.place.read(file, offset, count)
        except OSError as e:
            raise CheckpointError(f"cannot read {self.label}/{file}: {e.strerror}", "Check its permissions.") from e
        if len(data) < count:
            raise CheckpointError(
                f"{self.label}/{file} ended at byte {offset + len(data):,}, {count - len(data):,} too early",
                self.again("Fetch it again."),
            )
        return data

    def _check_index(self) -> None:
        """Loaders use the headers of the files that the index names, so a wrong entry alone is harmless."""
        if self.index is None:
            return
        elsewhere = Counter(f for n, f in self.index.items() if n in self.tensors and self.tensors[n].file != f)
        lost = [name for name in self.index if name not in self.tensors]
        unlisted = [n for n, info in self.tensors.items() if n not in self.index and info.file != weight_files.OUTLIERS]
        for file, count in elsewhere.items():
            self.notes.append(f"the index places {count:,} tensors in {file} that are in another of its files")
        if lost:
            self.notes.append(f"the index names {_counted(lost, 'tensor')} that no file holds")
        if unlisted:
            self.notes.append(f"the index leaves out {_counted(unlisted, 'tensor')}")

    def _check_scales(self) -> None:
        """Finds float8 weights with scales but without a quantization_config. They would be read without their scales."""
        if self.quantization:
            return
        small = [name for name, info in self.tensors.items() if info.dtype in dtypes.FLOAT8]
        bases = {name.removesuffix("weight") for name in small}
        scales = [n for n in self.tensors if "scale" in n and any(n[:i] in bases for i in range(len(n)))] if small else []
        if scales:
            self.problems.append(
                f"{_counted(small, 'weight')} in float8 have scales ({scales[0]}, ...), but config.json has no quantization_config"
            )

    def read_ahead(self) -> None:
        """Asks the system to read the weight files of a folder now, while Python imports what will use them. It returns at once.

        Nothing is asked for where the files would take more than half of the free memory: their ends would push their beginnings
        out again.
        """
        free = available_memory()
        if free is not None and sum(map(self.place.size, self.files)) <= free // 2:
            threading.Thread(target=self.place.read_ahead, args=(self.files,), daemon=True).start()

    @property
    def fingerprint(self) -> str:
        """sha256 over config, headers, file sizes and, on the hub, the hub's hashes of the weight files."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(f"\n{file} {self.place.size(file)} {self.place.hash(file)}\n".encode() + self.headers[file].raw)
        return digest.hexdigest()

    def fetch_what_runs(self) -> None:
        """Fetches the files of tokenizers and templates into `config_folder`, where transformers looks for them."""
        for name in self.carried.to_run:
            self.place.local(name)

    def carried_bytes(self, name: str) -> bytes:
        """The content of one of `carried.files`. Raises CheckpointError, HubError."""
        try:
            return self.place.local(name).read_bytes()
        except OSError as e:
            raise CheckpointError(f"cannot read {self.label}/{name}: {e.strerror}", "Check its permissions.") from e

    def download_bytes(self, volume: Path) -> int:
        """Bytes that the run will download to the file system of `volume`."""
        return 0 if self.read_elsewhere else self.place.download_bytes(volume, self.files)

    def download_to(self, folder: Path, parts: bool = False) -> None:
        """Sets the folder for shards that are deleted once they are read: with `parts`, only what is asked for of each."""
        self.place.download_to(folder, parts)

    @contextmanager
    def open(self, file: str, parts: Sequence[tuple[int, int]] | None = None) -> Iterator[int]:
        """A file descriptor of a weight file, for pread. The file is fetched first if it is not here. `parts` (start, end) are the
        bytes that will be read of it, and where `download_to` asked for parts, no others are fetched."""
        path = self.place.weights(file) if parts is None else self.place.parts(file, parts)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise CheckpointError(f"cannot read {self.label}/{file}: {e.strerror}", "Check its permissions.") from e
        try:
            size = os.fstat(fd).st_size
            if size != self.place.size(file):
                raise CheckpointError(
                    f"{self.label}/{file} has {size:,} bytes, expected {self.place.size(file):,}", self.again("Fetch it again.")
                )
            yield fd
        finally:
            os.close(fd)

    def release(self, file: str) -> None:
        """Called when a weight file is no longer needed: a streamed shard is deleted."""
        self.place.release(file)


def _counted(names: list[str], what: str) -> str:
    """ "the tensor a", or "3 tensors (a, b, c)": the first five are named."""
    if len(names) == 1:
        return f"the {what} {names[0]}"
    return f"{len(names):,} {what}s ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def read_pieces(source: Source, pieces: Iterable[tuple[str, int, int]]) -> Iterator[bytes]:
    """The bytes of each piece (file, offset, count), in order. Raises what `Source.read` raises."""
    pool = ThreadPoolExecutor(_AHEAD, thread_name_prefix="qcli")
    under_way = deque()
    try:
        for piece in pieces:
            under_way.append(pool.submit(source.read, *piece))
            if len(under_way) > _AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
