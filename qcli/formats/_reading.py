"""What every format's reading shares: tensors held against what is expected of them, and problems told together."""

from collections.abc import Callable, Sequence
from math import prod

from qcli.checkpoint.layout import Linear
from qcli.checkpoint.safetensors_file import read_into
from qcli.checkpoint.source import Source
from qcli.errors import CheckpointError
from qcli.formats import Stored

_NAMED = 5  # problems that a message names


class Problem(Exception):
    """A weight that cannot be decoded. The message is for the list of them."""


def read_each(source: Source, linears: Sequence[Linear], read: Callable[[Source, Linear], Stored | None]) -> dict[str, Stored]:
    """Module to what `read` finds stored of it, without those of which it finds nothing.

    Raises CheckpointError with the problems of all of them.
    """
    found, problems = {}, []
    for linear in linears:
        try:
            stored = read(source, linear)
        except Problem as e:
            problems.append(str(e))
            continue
        if stored is not None:
            found[linear.module] = stored
    if problems:
        more = f"; and {len(problems) - _NAMED:,} more" if len(problems) > _NAMED else ""
        raise CheckpointError(f"{source.label}: {'; '.join(problems[:_NAMED])}{more}", made_again(source))
    return found


def made_again(source: Source) -> str:
    """What to do about a quantized checkpoint that is damaged: qcli's own can be made again."""
    if source.is_hub or "qcli.json" not in source.place.names:
        return source.again("Fetch it again, or ask whoever made it.")
    return "Quantize the model again."


def expect(source: Source, name: str, allowed: tuple[str, ...], shape: tuple[int, ...]) -> None:
    """Raises Problem unless the tensor `name` is of an allowed dtype and as large as `shape`; of two dimensions, of that shape."""
    info = source.tensors[name]
    if info.dtype not in allowed or prod(info.shape) != prod(shape) or (len(shape) > 1 and info.shape != shape):
        raise Problem(f"{name} is {info.dtype} of shape {list(info.shape)}, expected {' or '.join(allowed)} of {list(shape)}")


def present(source: Source, names: dict[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each attribute whose tensor is stored."""
    found = {attribute: source.tensors[name] for attribute, name in names.items() if name in source.tensors}
    return {attribute: (info.dtype, tuple(info.shape)) for attribute, info in found.items()}


def read_bytes(source: Source, name: str) -> bytes:
    """The data of a small tensor."""
    info = source.tensors[name]
    data = bytearray(info.nbytes)
    with source.open(info.file) as fd:
        read_into(fd, info.start, memoryview(data))
    return bytes(data)
