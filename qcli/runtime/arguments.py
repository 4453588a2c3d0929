"""The arguments of a CUDA kernel as the driver takes them: one buffer, each argument at a multiple of its own size."""

import struct
from collections.abc import Callable, Sequence

_PLAIN = {int, float, bool, bytes}  # all but tensors: quicker than isinstance
_CODES = {"p": "P", "i": "i", "q": "q", "f": "f"}


def packer(signature: str) -> Callable[[Sequence], bytes]:
    """A function that packs arguments; `signature` is as in `cuda.kernel`."""
    tables = [i for i, letter in enumerate(signature) if letter == "t"]
    layouts: dict[tuple[int, ...], struct.Struct] = {}

    def layout(sizes: tuple[int, ...]) -> struct.Struct:
        lengths = iter(sizes)
        # A table begins at a multiple of its elements' 4 bytes, which struct knows only of numbers.
        codes = (f"0i{next(lengths)}s" if letter == "t" else _CODES[letter] for letter in signature)
        return struct.Struct("@" + "".join(codes))

    def pack(arguments: Sequence) -> bytes:
        sizes = tuple([len(arguments[i]) for i in tables])
        if sizes not in layouts:
            layouts[sizes] = layout(sizes)
        return layouts[sizes].pack(*[v if type(v) in _PLAIN else v.data_ptr() for v in arguments])

    return pack
