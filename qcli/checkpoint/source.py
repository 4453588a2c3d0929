"""Where a model is read from: one face for a folder and for a hub repository. Opening one reads headers, never weights."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from qcli.checkpoint import hub as hubs
from qcli.checkpoint import torch_file
from qcli.checkpoint.local_files import LocalFiles
from qcli.checkpoint.safetensors_file import Header, TensorInfo, read_header_with
from qcli.errors import CheckpointError

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What is carried over to the output: what a tokenizer, a processor or a licence needs.
_CARRIED = re.compile(
    r"(tokenizer.*|vocab.*|merges\.txt|.*\.tiktoken|.*\.model|spiece.*|sentencepiece.*|special_tokens_map\.json|added_tokens\.json"
    r"|generation_config\.json|chat_template.*|additional_chat_templates/.*|.*processor_config\.json|LICENSE.*|LICENCE.*|NOTICE.*"
    r"|USE_POLICY.*|COPYING.*)",
    re.IGNORECASE,
)
_NEVER = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|onnx|h5|msgpack|index\.json)$")
_CONNECTIONS = 8  # at a time: the largest models have two hundred shards, and a header's time is the way there and back
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


def open_source(
    model: str, revision: str | None = None, *, stream: bool = False, trust_remote_code: bool = False
) -> "Source":
    """The checkpoint in the folder `model`, or in the hub repository of that id at `revision`.

    Raises CheckpointError, HubError. Faults that do not stop the reading of headers are listed in `Source.problems`.
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
        raise CheckpointError(
            f"{model} is a file, expected a model's folder", "Give the folder that holds config.json."
        )
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise CheckpointError(
            f"there is no folder {model}, and it is no hub id either", "Check the path, or write org/name."
        )
    return hubs.open_repository(model, revision, stream=stream)


class Source:
    """A checkpoint's headers, config and files.

    `tensors` maps each name to (file, TensorInfo), `files` lists the weight files in reading order, `fingerprint` recognises
    the checkpoint by its headers, its config and the hub's own hashes.
    """

    def __init__(self, place, label: str, trust_remote_code: bool):
        self.place, self.label = place, label
        self.name, self.revision, self.is_hub, self.stream = place.name, place.revision, place.is_hub, place.stream
        self.problems: list[str] = []
        self.config = self._json("config.json")
        self.config_folder = place.local("config.json").parent
        self.tensors: dict[str, tuple[str, TensorInfo]] = {}
        self.headers: dict[str, Header] = {}
        self.index = self._find_files()
        self._read_headers()
        self._check_index()
        carries = [n for n in place.names if _CARRIED.fullmatch(n) and not _NEVER.fullmatch(n)]
        if trust_remote_code:
            code = [n for n in place.names if n.endswith(".py")]
            for name in code:
                place.local(name)
            carries += code
        self.extra_files = carries

    def _json(self, name: str) -> dict:
        if name not in self.place.names:
            raise CheckpointError(
                f"{self.label} has no {name}", "Give the folder or repository of a Hugging Face model."
            )
        try:
            value = json.loads(self.place.local(name).read_bytes())
        except OSError as e:
            raise CheckpointError(f"cannot read {self.label}/{name}: {e.strerror}", "Check its permissions.") from e
        except ValueError as e:
            raise CheckpointError(f"{self.label}/{name} is not valid JSON: {e}", "Mend it or fetch it again.") from None
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.label}/{name} holds a JSON {type(value).__name__}, expected an object")
        return value

    def _find_files(self) -> dict[str, str] | None:
        """Sets `files`; returns the index's weight_map, if there is an index."""
        names = set(self.place.names)
        for index, single in zip(_INDEXES, ("model.safetensors", "pytorch_model.bin")):
            if single in names:
                self.files = [single]
                return None
            if index in names:
                weight_map = self._json(index).get("weight_map")
                valid = isinstance(weight_map, dict) and all(isinstance(v, str) for v in weight_map.values())
                if not valid or not weight_map:
                    raise CheckpointError(f"{self.label}/{index}: weight_map must map tensor names to file names")
                self.files = sorted(set(weight_map.values()))
                for file in self.files:
                    if "/" in file or "\\" in file or file in ("", ".", ".."):
                        raise CheckpointError(
                            f"{self.label}/{index} names the shard {file!r}, outside its own folder",
                            "Do not trust this model.",
                        )
                missing = [file for file in self.files if file not in names]
                if missing:
                    raise CheckpointError(
                        f"{self.label}/{index} names {len(missing)} shards that are not there: {', '.join(missing[:5])}",
                        "Fetch them, or fetch the model again.",
                    )
                return weight_map
        loose = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n)
        if len(loose) == 1:
            self.files = loose
            return None
        found = f"; found {', '.join(loose[:5])} without an index" if loose else ""
        raise CheckpointError(
            f"{self.label} has no model.safetensors, no pytorch_model.bin and no index of shards{found}",
            "Give the folder or repository that holds the weights.",
        )

    def _read_headers(self) -> None:
        with ThreadPoolExecutor(_CONNECTIONS if self.is_hub else 1) as pool:
            headers = list(pool.map(self._header, self.files))
        for file, header in zip(self.files, headers):
            self.headers[file] = header
            for name, info in header.tensors.items():
                if name in self.tensors:
                    self.problems.append(f"the tensor {name} stands in both {self.tensors[name][0]} and {file}")
                self.tensors[name] = (file, info)
        if not self.tensors:
            raise CheckpointError(f"{self.label} holds no tensors", "Fetch the model again.")

    def _header(self, file: str) -> Header:
        label = f"{self.label}/{file}"
        if file.endswith(".safetensors"):
            return read_header_with(lambda offset, count: self.read(file, offset, count), self.place.size(file), label)
        return torch_file.read_header(self.place.weights(file), label)

    def read(self, file: str, offset: int, count: int) -> bytes:
        """`count` bytes of a weight file from byte `offset` on. On the hub that is a ranged request: the file is not fetched.

        Threads may read at the same time. Raises CheckpointError, also where the file ends sooner, and HubError.
        """
        try:
            data = self.place.read(file, offset, count)
        except OSError as e:
            raise CheckpointError(f"cannot read {self.label}/{file}: {e.strerror}", "Check its permissions.") from e
        if len(data) < count:
            raise CheckpointError(
                f"{self.label}/{file} ended at byte {offset + len(data):,}, {count - len(data):,} too early",
                "Fetch it again.",
            )
        return data

    def _check_index(self) -> None:
        if self.index is None:
            return
        for name, file in self.index.items():
            if name not in self.headers[file].tensors:
                self.problems.append(f"the index places {name} in {file}, which does not hold it")
        for name in [n for n in self.tensors if n not in self.index]:
            self.problems.append(f"{name} in {self.tensors[name][0]} is not in the index")

    @property
    def fingerprint(self) -> str:
        """sha256 over config, headers, sizes and, on the hub, its own hashes of the weight files."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in self.files:
            digest.update(
                f"\n{file} {self.place.size(file)} {self.place.hash(file)}\n".encode() + self.headers[file].raw
            )
        return digest.hexdigest()

    def extra_path(self, name: str) -> Path:
        """A local path of one of `extra_files`."""
        return self.place.local(name)

    def download_bytes(self, volume: Path) -> int:
        """Bytes that will be downloaded to the file system of `volume` while the run lasts."""
        return self.place.download_bytes(volume, self.files)

    def download_to(self, folder: Path) -> None:
        """Where to keep shards that are to be deleted once they are read."""
        self.place.download_to(folder)

    @contextmanager
    def open(self, file: str) -> Iterator[int]:
        """A descriptor for preads of a weight file, which is fetched first if it is not here."""
        path = self.place.weights(file)
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise CheckpointError(f"cannot read {self.label}/{file}: {e.strerror}", "Check its permissions.") from e
        try:
            size = os.fstat(fd).st_size
            if size != self.place.size(file):
                raise CheckpointError(
                    f"{self.label}/{file} has {size:,} bytes, expected {self.place.size(file):,}", "Fetch it again."
                )
            yield fd
        finally:
            os.close(fd)

    def release(self, file: str) -> None:
        """Lets go of a weight file that is read to its end."""
        self.place.release(file)
