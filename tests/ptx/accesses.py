"""Loads, stores, atomics and asynchronous copies."""

import numpy as np

from tests.ptx.arithmetic import TYPES
from tests.ptx.control import of_lanes, of_warps
from tests.ptx.lanes import UNSIGNED
from tests.ptx.memory import AccessFault, check_alignment
from tests.ptx.parse import Instruction, Parameter, PtxError
from tests.ptx.values import SHARED_WINDOW, Step, addresses, as_register, reader


def _spaces(opcode: tuple[str, ...], where: np.ndarray) -> tuple[bool, np.ndarray]:
    """(whether the addresses are in shared memory, the addresses within that memory)."""
    if "shared" in opcode or "global" in opcode:
        return "shared" in opcode, where
    shared = where >= np.uint64(SHARED_WINDOW)
    if shared.any() and not shared.all():
        raise PtxError("a generic access to both shared and global memory")
    return bool(shared.any()), where - np.uint64(SHARED_WINDOW) * shared


def load(instruction: Instruction) -> Step:
    """ld: loads one value, or a vector of two or four."""
    opcode, (target, address) = instruction.opcode, instruction.operands
    if "param" in opcode:
        return _load_parameter(instruction)
    dtype, targets, read = (np.dtype(TYPES[opcode[-1]]), target if isinstance(target, tuple) else (target,), addresses(address))

    def step(m, place: int) -> int:
        lanes = m.lanes_of(instruction)
        shared, where = _spaces(opcode, read(m)[lanes])
        if not len(where):
            return place + 1
        if shared:
            found = m.shared.load(np.flatnonzero(lanes), where, dtype.itemsize, len(targets))
        else:
            found = m.memory.load(where, dtype.itemsize, len(targets))
        for register, values in zip(targets, found):
            full = np.empty(m.count, UNSIGNED[register.bits])
            full[lanes] = as_register(values.view(dtype), register)
            m.write(register, full, instruction)
        return place + 1

    return step


def _load_parameter(instruction: Instruction) -> Step:
    """ld.param: loads from the arguments of the launch, or of a call."""
    kind, (target, address) = instruction.opcode[-1], instruction.operands
    dtype = np.dtype(TYPES[kind])
    if isinstance(address.base, Parameter):
        read_value = reader(address.base, kind)

        def of_call(m, place: int) -> int:
            m.write(target, as_register(read_value(m), target), instruction)
            return place + 1

        return of_call
    read = addresses(address)

    def of_launch(m, place: int) -> int:
        lanes = m.lanes_of(instruction)
        where = read(m)[lanes]
        check_alignment(where, dtype.itemsize)
        inside = np.zeros(len(where), bool)
        for first, size in m.function.arguments.values():
            inside |= (where >= first) & (where + np.uint64(dtype.itemsize) <= first + size)
        if not inside.all():
            wrong = int((~inside).argmax())
            raise AccessFault(f"a read of byte {int(where[wrong])} of the arguments, which is in none of them", wrong)
        words = np.frombuffer(m.arguments[: len(m.arguments) // dtype.itemsize * dtype.itemsize], dtype)
        full = np.empty(m.count, UNSIGNED[target.bits])
        full[lanes] = as_register(words[where.astype(np.int64) // dtype.itemsize], target)
        m.write(target, full, instruction)
        return place + 1

    return of_launch


def store(instruction: Instruction) -> Step:
    """st: stores one value, or a vector."""
    opcode, (address, source) = instruction.opcode, instruction.operands
    sources = source if isinstance(source, tuple) else (source,)
    readers = [reader(operand, opcode[-1]) for operand in sources]
    if "param" in opcode:

        def to_call(m, place: int) -> int:
            m.write(address.base, as_register(readers[0](m), address.base), instruction)
            return place + 1

        return to_call
    read = addresses(address)

    def step(m, place: int) -> int:
        lanes = m.lanes_of(instruction)
        shared, where = _spaces(opcode, read(m)[lanes])
        values = [np.broadcast_to(value(m), m.count)[lanes] for value in readers]
        values = [value.view(UNSIGNED[8 * value.itemsize]) for value in values]
        if not len(where):
            return place + 1
        if shared:
            m.shared.store(np.flatnonzero(lanes), where, values)
        else:
            m.memory.store(where, values)
        return place + 1

    return step


_ATOMIC = {"or": lambda a, b: a | b, "and": lambda a, b: a & b, "max": max, "min": min, "add": lambda a, b: a + b}


def atom(instruction: Instruction) -> Step:
    """atom: an atomic operation on shared memory, lane by lane."""
    opcode, (target, address, source) = instruction.opcode, instruction.operands
    if "shared" not in opcode or opcode[-2] not in _ATOMIC:
        raise PtxError(f"the interpreter does not know {instruction.text}")
    read, value, function = addresses(address), reader(source, opcode[-1]), _ATOMIC[opcode[-2]]

    def step(m, place: int) -> int:
        lanes = np.flatnonzero(m.lanes_of(instruction))
        where, values = read(m)[lanes], np.broadcast_to(value(m), m.count)[lanes]
        before = np.zeros(m.count, UNSIGNED[target.bits])
        for i, lane in enumerate(lanes):
            try:
                old = m.shared.change(int(lane), int(where[i]), function, values[i])
            except AccessFault as e:
                raise AccessFault(str(e), i) from None
            before[lane] = old.view(UNSIGNED[target.bits])
        m.write(target, before, instruction)
        return place + 1

    return step


def copy(instruction: Instruction) -> Step:
    """cp.async: begins a copy, closes a group of copies, or waits for all but the latest groups of a thread. The data are read and
    written when the thread waits for them, never before."""
    opcode, operands = instruction.opcode, instruction.operands
    if "commit_group" in opcode:

        def commit(m, place: int) -> int:
            m.group[m.lanes_of(instruction)] += 1
            return place + 1

        return commit
    if "wait_group" in opcode or "wait_all" in opcode:
        latest = operands[0].value if operands else -1

        def wait(m, place: int) -> int:
            lanes = m.lanes_of(instruction)
            m.copies = [left for pending in m.copies if (left := _land(m, pending, lanes, latest))]
            return place + 1

        return wait
    if opcode[2:] != ("cg", "shared", "global") or operands[2].value != 16:
        raise PtxError(f"the interpreter does not know {instruction.text}")
    to, source = addresses(operands[0]), addresses(operands[1])
    nbytes = reader(operands[3], "u32") if len(operands) > 3 else lambda m: np.array(16, np.uint32)

    def begin(m, place: int) -> int:
        lanes = np.flatnonzero(m.lanes_of(instruction))
        sources, sizes = source(m)[lanes], np.broadcast_to(nbytes(m), m.count)[lanes]
        index = m.shared.expect(lanes, to(m)[lanes], 16)
        check_alignment(sources, 16)
        if not np.isin(sizes, (0, 16)).all():
            raise PtxError(f"{instruction.text}: a partial copy")
        try:
            m.memory.which(sources[sizes > 0], 16, "a copy")
        except AccessFault as e:
            raise AccessFault(str(e), int(np.flatnonzero(sizes > 0)[e.place])) from None
        m.copies.append((lanes, m.group[lanes], index, sources, sizes))
        return place + 1

    return begin


def _land(m, pending: tuple, lanes: np.ndarray, latest: int) -> tuple | None:
    """Ends the copies that those lanes wait for. Returns the other copies."""
    of, group, index, sources, sizes = pending
    done = lanes[of] & (group < m.group[of] - latest)
    if done.any():
        data = np.zeros((int(done.sum()), 16), np.uint8)
        some = sizes[done] > 0
        if some.any():
            data[some] = np.stack(m.memory.load(sources[done][some], 4, 4), 1).view(np.uint8)
        m.shared.land(of[done], index[done], data)
    return None if done.all() else tuple(part[~done] for part in pending)


def ldmatrix(instruction: Instruction) -> Step:
    """Lane i gives the address of row i % 8 of matrix i / 8. It gets the 32 bits at 4 (i % 4) of row i / 4 of each matrix."""
    target, address = instruction.operands
    if instruction.opcode[1:] != ("sync", "aligned", "m8n8", "x4", "shared", "b16"):
        raise PtxError(f"the interpreter does not know {instruction.text}")
    read, lane = addresses(address), np.arange(32)

    def run(m, whole: np.ndarray):
        where = of_lanes(m, read(m), whole).reshape(-1)
        rows = np.stack(m.shared.load(np.flatnonzero(np.repeat(whole, 32)), where, 4, 4), 1).reshape(-1, 32, 4)
        return [(register, rows[:, 8 * i + lane // 4, lane % 4]) for i, register in enumerate(target)]

    return of_warps(instruction, run)
