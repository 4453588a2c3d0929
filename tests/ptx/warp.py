"""Instructions of whole warps: products of matrices, shuffles, votes. Arrays are [warps, 32].

Which lane holds which element is described as in the PTX ISA ("Matrix fragments for mma.m16n8k16 with floating point type" and the
neighbouring sections): by a row and a column for element i of a lane's fragment, computed from groupID = lane / 4 and
threadID_in_group = lane % 4.
"""

import numpy as np

from tests.ptx.parse import PtxError

LANES = np.arange(32)
GROUP, THREAD = LANES[:, None] // 4, LANES[:, None] % 4


def _fragment(elements: int, row, column) -> tuple[np.ndarray, np.ndarray]:
    """The rows and the columns, each [32, elements], of the lanes' elements."""
    i = np.arange(elements)[None]
    return tuple(np.broadcast_to(place(i), (32, elements)) for place in (row, column))


# shape: (A, B, C and D), each (rows, columns) of the lanes' elements; B's rows are k.
FRAGMENTS = {
    "m16n8k16": (
        _fragment(8, lambda i: GROUP + 8 * (i // 2 % 2), lambda i: THREAD * 2 + i % 2 + 8 * (i // 4)),
        _fragment(4, lambda i: THREAD * 2 + i % 2 + 8 * (i // 2), lambda i: GROUP),
        _fragment(4, lambda i: GROUP + 8 * (i // 2), lambda i: THREAD * 2 + i % 2),
    ),
    "m16n8k8": (
        _fragment(4, lambda i: GROUP + 8 * (i // 2), lambda i: THREAD * 2 + i % 2),
        _fragment(2, lambda i: THREAD * 2 + i, lambda i: GROUP),
        _fragment(4, lambda i: GROUP + 8 * (i // 2), lambda i: THREAD * 2 + i % 2),
    ),
    "m16n8k32": (
        _fragment(16, lambda i: GROUP + 8 * (i // 4 % 2), lambda i: THREAD * 4 + i % 4 + 16 * (i // 8)),
        _fragment(8, lambda i: THREAD * 4 + i % 4 + 16 * (i // 4), lambda i: GROUP),
        _fragment(4, lambda i: GROUP + 8 * (i // 2), lambda i: THREAD * 2 + i % 2),
    ),
    "m8n8k16": (
        _fragment(4, lambda i: GROUP, lambda i: THREAD * 4 + i),
        _fragment(4, lambda i: THREAD * 4 + i, lambda i: GROUP),
        _fragment(2, lambda i: GROUP, lambda i: THREAD * 2 + i),
    ),
}


def _matrix(registers: list[np.ndarray], kind: str, places) -> np.ndarray:
    """The matrix [warps, rows, columns] in float64 or int64, from registers [warps, 32] of packed elements."""
    words = np.stack(registers, -1)
    if kind == "bf16":
        values = (np.ascontiguousarray(words).view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    else:
        dtype = {"f16": np.float16, "f32": np.float32, "s8": np.int8, "s32": np.int32}[kind]
        values = np.ascontiguousarray(words).view(dtype).astype(np.int64 if kind[0] == "s" else np.float64)
    rows, columns = places
    matrix = np.zeros((len(words), rows.max() + 1, columns.max() + 1), values.dtype)
    matrix[:, rows, columns] = values
    return matrix


def mma(opcode: tuple[str, ...], a: list, b: list, c: list) -> list[np.ndarray]:
    """Registers [warps, 32] of D = A B + C. Float sums are rounded once; the hardware's own roundings are not known."""
    name, sync, aligned, shape, row, column, of_d, of_a, of_b, of_c = opcode
    if shape not in FRAGMENTS or (row, column) != ("row", "col") or of_a != of_b or of_c != of_d:
        raise PtxError(f"the interpreter does not know {'.'.join(opcode)}")
    places = FRAGMENTS[shape]
    left, right, added = (_matrix(r, kind, p) for r, kind, p in zip((a, b, c), (of_a, of_b, of_c), places))
    rows, columns = places[2]
    result = (left @ right + added)[:, rows, columns]
    result = result.astype(np.int64).astype(np.int32) if of_d == "s32" else result.astype(np.float32)
    return [np.ascontiguousarray(result[..., i]).view(np.uint32) for i in range(result.shape[-1])]


def shuffle(mode: str, value: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(value of the source lane, whether it is in the segment), both [warps, 32], by the pseudo-code of the ISA."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    most = (LANES & segment) | (clamp & ~segment)
    least = LANES & segment
    if mode == "up":
        source = LANES - b.astype(np.int64)
        valid = source >= most
    elif mode == "down":
        source = LANES + b.astype(np.int64)
        valid = source <= most
    elif mode == "bfly":
        source = LANES ^ b
        valid = source <= most
    else:
        source = least | (b & ~segment & 31)
        valid = source <= most
    source = np.where(valid, source, LANES).astype(np.int64)
    return np.take_along_axis(value, source, 1), valid


def ballot(predicate: np.ndarray) -> np.ndarray:
    """[warps, 32]: a bit for each lane whose predicate holds."""
    word = (predicate.astype(np.uint32) << LANES.astype(np.uint32)).sum(1, dtype=np.uint32)
    return np.broadcast_to(word[:, None], predicate.shape)
