"""The memories of a launch. Every access must be aligned to its size and be within one array.

The layout of shared memory is the worst that its declarations allow: each array begins at an odd multiple of its alignment, with
unused gaps before and after it. Memory must be written before it is read. Bytes that an asynchronous copy will still fill must not
be accessed. Two warps may access the same bytes only with a barrier between (races.py).
"""

import ctypes

import numpy as np

from tests.ptx.parse import Variable
from tests.ptx.races import Races

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
ONES = {size: int.from_bytes(b"\1" * size, "little") for size in WORDS}  # each byte 1
GAP = 32  # unused bytes between arrays


class AccessFault(Exception):
    """What is wrong with an access. `place` is the index of the first wrong address."""

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place


def check_alignment(addresses: np.ndarray, size: int) -> None:
    """Raises AccessFault."""
    wrong = addresses % np.uint64(size) != 0
    if wrong.any():
        place = int(wrong.argmax())
        raise AccessFault(f"{size} bytes at {int(addresses[place]):#x}, no multiple of {size}", place)


class Global:
    """Global memory: the arrays whose addresses a launch got, {address in this process: bytes}."""

    def __init__(self, arrays: dict[int, int]):
        kept = sorted((address, nbytes) for address, nbytes in arrays.items() if nbytes)
        self.first = np.array([address for address, _ in kept], np.uint64)
        self.end = np.array([address + nbytes for address, nbytes in kept], np.uint64)
        self.bytes = [np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(address)) for address, n in kept]

    def which(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """For each address, the number of the array that contains its `size` bytes. Raises AccessFault."""
        check_alignment(addresses, size)
        which = np.searchsorted(self.first, addresses, "right").astype(np.int64) - 1
        outside = which < 0
        if len(self.end):
            outside |= addresses + np.uint64(size) > self.end[which]
        if outside.any():
            place = int(outside.argmax())
            raise AccessFault(f"{what} of {size} bytes at {self._describe(int(addresses[place]))}", place)
        return which

    def _find(self, addresses: np.ndarray, size: int, what: str) -> list[tuple[np.ndarray | slice, np.ndarray, np.ndarray]]:
        """For each array that is accessed: (which addresses are in it, the array as words of that size, the indices of those
        words). Raises AccessFault."""
        which = self.which(addresses, size, what)
        if (which == which[0]).all():
            return [self._words(int(which[0]), addresses, slice(None), size)]
        return [self._words(int(n), addresses, which == n, size) for n in np.unique(which)]

    def _words(self, n: int, addresses: np.ndarray, chosen: np.ndarray | slice, size: int):
        begin = -int(self.first[n]) % size
        data = self.bytes[n][begin:]
        words = data[: len(data) // size * size].view(WORDS[size])
        return chosen, words, (addresses[chosen] - self.first[n]).astype(np.int64) // size

    def _describe(self, address: int) -> str:
        near = max(range(len(self.first)), key=lambda n: (int(self.first[n]) <= address, int(self.first[n])), default=None)
        if near is None:
            return f"{address:#x}; the launch was given no array"
        first, end = int(self.first[near]), int(self.end[near])
        return f"byte {address - first} of an array of {end - first}: outside of all that the launch was given"

    def load(self, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """`count` words of `size` bytes from each address, which must be a multiple of their total size."""
        check_alignment(addresses, size * count)
        found = []
        for i in range(count):
            values = np.empty(len(addresses), WORDS[size])
            for chosen, words, index in self._find(addresses + np.uint64(i * size), size, "a read"):
                values[chosen] = words[index]
            found.append(values)
        return found

    def store(self, addresses: np.ndarray, values: list[np.ndarray]) -> None:
        """As `load`."""
        size = values[0].itemsize
        check_alignment(addresses, size * len(values))
        for i, value in enumerate(values):
            for chosen, words, index in self._find(addresses + np.uint64(i * size), size, "a write"):
                words[index] = value[chosen]


class Shared:
    """The shared memory of several blocks. An access has the number of its lane, and an address within its block."""

    def __init__(self, variables: list[Variable], dynamic: int, blocks: int, threads: int):
        self.threads, self.address, self.sizes = threads, {}, {}
        end = 0
        for variable in sorted(variables, key=lambda v: v.size is None):  # dynamic shared memory comes last
            begin = end + GAP
            begin += -begin % (2 * variable.align) + variable.align
            self.address[variable.name] = begin
            self.sizes[variable.name] = dynamic if variable.size is None else variable.size
            end = begin + self.sizes[variable.name]
        self.stride = end + GAP + -(end + GAP) % 16
        self.inside = np.zeros(self.stride + 1, np.int32)  # the number of each byte's array, 0 for none
        for number, (name, begin) in enumerate(self.address.items()):
            self.inside[begin : begin + self.sizes[name]] = number + 1
        self.bytes = np.full(blocks * self.stride, 0xFF, np.uint8)
        self.set = np.zeros(blocks * self.stride, np.uint8)  # 1 where written
        self.coming = np.zeros(blocks * self.stride, np.uint8)  # 1 where a copy is unfinished
        self.any_coming = False
        self.races, self.interval = Races(blocks * self.stride), np.zeros(blocks, np.int32)

    def load(self, lanes: np.ndarray, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """As `Global.load`."""
        index = self._index(lanes, addresses, size * count, "a read")
        self._check_race(self.races.on_read(index, size * count, *self._who(lanes)), addresses, size * count, "a read")
        found = []
        for i in range(count):
            place = (index + i * size) // size
            unset = self.set.view(WORDS[size])[place] != ONES[size]
            if unset.any():
                first = int(unset.argmax())
                where = self._describe(int(addresses[first]) + i * size)
                raise AccessFault(f"a read of {size} bytes at {where}, which nobody has written", first)
            found.append(self.bytes.view(WORDS[size])[place])
        return found

    def store(self, lanes: np.ndarray, addresses: np.ndarray, values: list[np.ndarray]) -> None:
        """As `load`."""
        size = values[0].itemsize
        index = self._index(lanes, addresses, size * len(values), "a write")
        for i, value in enumerate(values):
            at = index + i * size
            memory, written = self.bytes.view(WORDS[size]), self.set.view(WORDS[size])
            new = (memory[at // size] != value) | (written[at // size] != ONES[size])
            wrong = self.races.on_write(at, size, *self._who(lanes), new)
            memory[at // size] = value
            written[at // size] = ONES[size]
            wrong |= memory[at // size] != value  # another lane wrote another value in this instruction
            self._check_race(wrong, addresses, size, "a write")

    def change(self, lane: int, address: int, function, value: np.generic) -> np.generic:
        """An atomic operation. Returns the old value."""
        lanes, addresses, size = np.array([lane]), np.array([address], np.uint64), value.itemsize
        index = self._index(lanes, addresses, size, "an atomic operation")
        if self.set.view(WORDS[size])[index[0] // size] != ONES[size]:
            raise AccessFault(f"an atomic operation on {self._describe(address)}, which nobody has written", 0)
        wrong = self.races.on_write(index, size, *self._who(lanes), np.ones(1, bool), atomic=True)
        self._check_race(wrong, addresses, size, "an atomic operation")
        memory = self.bytes.view(value.dtype)
        before = memory[index[0] // size]
        memory[index[0] // size] = function(before, value)
        return before

    def expect(self, lanes: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
        """Begins copies to these addresses. Returns their indices, for `land`."""
        index = self._index(lanes, addresses, size, "a copy")
        wrong = self.races.on_write(index, size, *self._who(lanes), np.ones(len(lanes), bool))
        self._check_race(wrong, addresses, size, "a copy")
        self.coming.reshape(-1, size)[index // size] = 1
        self.any_coming = True
        return index

    def land(self, lanes: np.ndarray, index: np.ndarray, data: np.ndarray) -> None:
        """Ends copies. `data` is uint8 [lanes, bytes]."""
        size = data.shape[1]
        self.races.on_write(index, size, *self._who(lanes), np.ones(len(lanes), bool))
        self.bytes.reshape(-1, size)[index // size] = data
        self.set.reshape(-1, size)[index // size] = 1
        self.coming.reshape(-1, size)[index // size] = 0
        self.any_coming = bool(self.coming.any())

    def _who(self, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the lanes' warps, the lanes' intervals between barriers)."""
        return lanes // 32, self.interval[lanes // self.threads]

    def _index(self, lanes: np.ndarray, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        check_alignment(addresses, size)
        low = np.minimum(addresses, np.uint64(self.stride)).astype(np.int64)
        high = np.minimum(low + size - 1, self.stride)
        outside = (self.inside[low] == 0) | (self.inside[low] != self.inside[high])
        if outside.any():
            place = int(outside.argmax())
            raise AccessFault(f"{what} of {size} bytes at {self._describe(int(addresses[place]))}", place)
        index = lanes // self.threads * self.stride + low
        if self.any_coming:
            early = (self.coming[index] | self.coming[index + size - 1]) != 0
            if early.any():
                place = int(early.argmax())
                where = self._describe(int(addresses[place]))
                raise AccessFault(
                    f"{what} of {size} bytes at {where}, which an asynchronous copy that nobody has waited for is to fill", place
                )
        return index

    def _check_race(self, wrong: np.ndarray, addresses: np.ndarray, size: int, what: str) -> None:
        if wrong.any():
            place = int(wrong.argmax())
            where = self._describe(int(addresses[place]))
            raise AccessFault(f"{what} of {size} bytes at {where}, which another warp touches without a barrier between", place)

    def _describe(self, address: int) -> str:
        if not self.address:
            return f"{address:#x}; the kernel has no shared memory"
        below = [name for name, begin in self.address.items() if begin <= address]
        name = max(below or self.address, key=lambda name: self.address[name])
        return f"byte {address - self.address[name]} of {name}, an array in shared memory of {self.sizes[name]} bytes"
