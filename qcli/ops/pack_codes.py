"""Codes of a few bits into 32-bit words, in the layouts of the formats (qcli/packing.py):
rows     a stream of bits along each row, the first code in the low bits (compressed-tensors)
columns  the same, and then transposed: a stream down each column of the transposed weight (GPTQ)
awq      words of eight rows each, of 4 bits, in AWQ's order, transposed
planes   units of 64 columns of 2, 3 or 4 bits (qcli)
"""

import numpy as np
import torch

from qcli.ops._library import define
from qcli.packing import AWQ_ORDER, pack_planes, pack_words, plane_bytes, to_unsigned, words_of
from qcli.runtime import cpu

_BITS = {"rows": (2, 3, 4, 8), "columns": (2, 3, 4, 8), "awq": (4,), "planes": (2, 3, 4)}
LAYOUTS = tuple(_BITS)  # by their numbers in the kernel
_ORDER = np.array(AWQ_ORDER, dtype=np.int32)


def _reference(codes: torch.Tensor, bits: int, layout: str) -> torch.Tensor:
    _check(codes, bits, layout)
    if not codes.numel():
        return _fake(codes, bits, layout)
    unsigned = to_unsigned(codes, bits) if codes.dtype == torch.int8 else codes
    if layout == "planes":
        return pack_planes(unsigned, bits).view(torch.int32)
    if layout == "awq":
        ordered = unsigned.t().unflatten(1, (-1, len(AWQ_ORDER)))[..., list(AWQ_ORDER)]
        return pack_words(ordered.flatten(1).contiguous(), bits)
    words = pack_words(unsigned, bits)
    return words if layout == "rows" else words.t().clone(memory_format=torch.contiguous_format)


def _fake(codes: torch.Tensor, bits: int, layout: str) -> torch.Tensor:
    rows, columns = codes.shape
    if layout == "planes":
        shape = rows, plane_bytes(columns, bits) // 4
    elif layout == "awq":
        shape = columns, rows // len(AWQ_ORDER)
    else:
        shape = (rows, words_of(columns, bits)) if layout == "rows" else (words_of(columns, bits), rows)
    return codes.new_empty(shape, dtype=torch.int32)


def _check(codes, bits, layout):
    op = "pack_codes"
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout is {layout!r}, expected {', '.join(LAYOUTS)}")
    if bits not in _BITS[layout]:
        raise ValueError(f"{op}: bits is {bits}, expected {', '.join(map(str, _BITS[layout]))}")
    if codes.dim() != 2 or codes.dtype not in (torch.int8, torch.uint8):
        raise ValueError(f"{op}: codes are {codes.dtype} in {codes.dim()} dimensions, expected bytes in rows and columns")
    if layout == "awq" and len(codes) % len(AWQ_ORDER):
        raise ValueError(f"{op}: codes have {len(codes)} rows, expected a multiple of {len(AWQ_ORDER)}")


_kernel = cpu.kernel("pack_codes", "pqqiiipp")


def _cpu(codes: torch.Tensor, bits: int, layout: str) -> torch.Tensor:
    _check(codes, bits, layout)
    codes, words = codes.contiguous(), _fake(codes, bits, layout)
    offset = 1 << (bits - 1) if codes.dtype == torch.int8 else 0
    _kernel(codes, *codes.shape, bits, offset, LAYOUTS.index(layout), cpu.address(_ORDER), words)
    return words


_op = define("pack_codes(Tensor codes, int bits, str layout) -> Tensor", _reference, _fake, _cpu)


def pack_codes(codes: torch.Tensor, bits: int, layout: str) -> torch.Tensor:
    """codes [rows, columns] of 2, 3, 4 or 8 bits: uint8, or int8 in [-2^(bits-1), 2^(bits-1) - 1], to which 2^(bits-1) is added.

    Returns words int32: [rows, ceil(columns bits / 32)] for "rows", that transposed for "columns", [columns, rows / 8] for "awq",
    [rows, 2 bits ceil(columns / 64)] for "planes". The last word of a stream, and the last unit, are padded with zeros. Raises
    ValueError for anything else.
    """
    return _op(codes, bits, layout)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for layout, possible in _BITS.items():
        for bits in possible:
            for shape in ((8, 64), (40, 33), (16, 5), (272, 512), (0, 32)):
                for dtype, least in ((torch.int8, -(1 << (bits - 1))), (torch.uint8, 0)):
                    codes = torch.randint(least, least + (1 << bits), shape, generator=generator).to(dtype)
                    name = f"{bits}-{layout}-{'x'.join(map(str, shape))}-{str(dtype)[6:]}"
                    yield name, {"codes": codes, "bits": bits, "layout": layout}
