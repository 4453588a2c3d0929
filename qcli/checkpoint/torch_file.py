"""`.bin` checkpoints: the names, dtypes, shapes and byte positions of a torch zip pickle's tensors, without reading them.

torch.load(weights_only=True) reads the pickle: it builds tensors and nothing else. It runs under fake tensors, which have no
data; torch then notes the position of each storage in the file. Storages are uncompressed, so weights are read by pread, as
from safetensors.
"""

import json
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qcli.checkpoint.safetensors_file import Header, TensorInfo
from qcli.errors import CheckpointError

_RESAVE = "Save it as safetensors with transformers (save_pretrained), and quantize that."
# One thread for all fake tensors. torch 2.11 for CUDA crashes, on a machine without CUDA, when a thread uses fake tensors after
# another thread that used them has ended.
_FAKES = ThreadPoolExecutor(1, thread_name_prefix="qcli")


def read_header(path: Path, file: str, label: str) -> Header:
    """The tensors of a `.bin` file, called `label` in messages. Raises CheckpointError."""
    try:
        whole_zip = zipfile.is_zipfile(path)
        if not whole_zip and os.path.getsize(path) == 0:
            raise CheckpointError(f"{label} is empty", "Fetch it again.")
    except OSError as e:
        raise CheckpointError(f"cannot read {label}: {e.strerror}", "Check its permissions.") from e
    if not whole_zip:
        raise CheckpointError(
            f"{label} is not a zip file: it is damaged, or in the layout of torch before 1.6, which cannot be read in pieces",
            _RESAVE,
        )
    _check_archive(path, label)
    tensors = [_tensor(file, label, name, value) for name, value in _FAKES.submit(_load, path, label).result().items()]
    size = os.path.getsize(path)
    for tensor in tensors:
        if tensor.end > size:
            raise CheckpointError(f"{label}: {tensor.name} ends at byte {tensor.end:,}, the file has {size:,}", "Fetch it again.")
    tensors.sort(key=lambda t: (t.start, t.name))
    raw = json.dumps([[t.name, t.dtype, t.shape, t.start] for t in tensors]).encode()
    return Header({t.name: t for t in tensors}, {}, raw)


def _check_archive(path: Path, label: str) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{label}: the record {record.filename} is compressed", _RESAVE)
                if record.filename.endswith("/byteorder") and archive.read(record) != b"little":
                    raise CheckpointError(f"{label} was written on a big-endian machine", _RESAVE)
    except zipfile.BadZipFile as e:
        raise CheckpointError(f"{label} is a damaged zip file: {e}", "Fetch it again.") from None


def _load(path: Path, label: str) -> dict:
    import pickle

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else "its pickle is refused"
        raise CheckpointError(
            f"{label} holds more than tensors, and qcli does not run such a pickle: {reason[:200]}", _RESAVE
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as e:
        raise CheckpointError(f"{label} cannot be read by torch: {str(e).splitlines()[0][:200]}", "Fetch it again.") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise CheckpointError(f"{label} holds a {type(state).__name__}, expected a state dict of named tensors", _RESAVE)
    others = [k for k, v in state.items() if not isinstance(v, torch.Tensor)]
    if others:
        raise CheckpointError(f"{label}: {others[0]} is not a tensor, expected a bare state dict", _RESAVE)
    return state


def _tensor(file: str, label: str, name: str, tensor) -> TensorInfo:
    from qcli.checkpoint.dtypes import CODES

    code = CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None:
        raise CheckpointError(f"{label}: {name} has dtype {tensor.dtype}, which qcli does not read", _RESAVE)
    if not tensor.is_contiguous():
        raise CheckpointError(f"{label}: {name} is stored with strides {tuple(tensor.stride())}, expected contiguous", _RESAVE)
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:
        raise CheckpointError(f"{label}: torch does not report the position of {name} in the file", _RESAVE)
    start += tensor.storage_offset() * tensor.element_size()
    return TensorInfo(file, name, code, tuple(tensor.shape), start, start + tensor.numel() * tensor.element_size())
