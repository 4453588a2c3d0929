"""Branches, calls, barriers, and instructions that a warp runs together."""

from collections.abc import Callable, Iterable

import numpy as np

from tests.ptx import warp
from tests.ptx.lanes import AT_BARRIER, EXITED, IN_WARP, READY
from tests.ptx.parse import Instruction, PtxError, Register
from tests.ptx.values import Step, reader


def bra(instruction: Instruction) -> Step:
    """bra: lanes diverge if some branch and some do not."""
    label = instruction.operands[0].name

    def step(m, place: int) -> int | None:
        to, taken = m.module.labels[label], m.lanes_of(instruction)
        if taken is m.running or np.array_equal(taken, m.running):
            return to
        if not taken.any():
            return place + 1
        m.pc[m.running] = place + 1
        m.pc[taken] = to
        return None

    return step


def call(instruction: Instruction) -> Step:
    """call: calls a function that returns nothing."""
    callee, *actual = instruction.operands

    def step(m, place: int) -> None:
        function, lanes = m.module.functions[callee.name], m.lanes_of(instruction).copy()
        for formal, register in zip(function.parameters, actual, strict=True):
            m.write(formal, m.registers[register.number], instruction)
        m.calls.append((lanes, place + 1))
        m.pc[m.running] = place + 1
        m.pc[lanes] = function.first

    return step


def ret(instruction: Instruction) -> Step:
    """ret: returns from a lane's latest call, or from the kernel."""

    def step(m, place: int) -> None:
        left = m.lanes_of(instruction).copy()
        m.pc[m.running] = place + 1
        for lanes, to in reversed(m.calls):
            m.pc[lanes & left] = to
            lanes[:], left = lanes & ~left, left & ~lanes
        m.calls = [(lanes, to) for lanes, to in m.calls if lanes.any()]
        m.state[left] = EXITED

    return step


def barrier(instruction: Instruction) -> Step:
    """A barrier of a block: when its last thread arrives, all continue. `bar.warp.sync` is a barrier of a warp."""
    if "warp" in instruction.opcode:
        read = reader(instruction.operands[0], "b32")
        return of_warps(instruction, lambda m, whole: _members(m, instruction, of_lanes(m, read(m), whole)) or [])

    def step(m, place: int) -> None:
        lanes = m.lanes_of(instruction)
        m.pc[m.running] = place + 1
        m.pc[lanes], m.state[lanes] = place, AT_BARRIER
        together = ((m.state == AT_BARRIER) & (m.pc == place)).reshape(-1, m.threads).all(1)
        released = np.repeat(together, m.threads)
        m.shared.interval[together] += 1
        m.pc[released], m.state[released] = place + 1, READY

    return step


def of_lanes(m, values: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The values [warps, 32] of the warps that are `whole`."""
    return np.broadcast_to(values, m.count).reshape(-1, 32)[whole]


def of_warps(instruction: Instruction, run: Callable[..., Iterable[tuple[Register, np.ndarray]]]) -> Step:
    """A step that runs whole warps. run(machine, whole) gives registers and their values [warps, 32] for the warps that are
    `whole`. Lanes of other warps wait."""

    def step(m, place: int) -> int | None:
        lanes = m.lanes_of(instruction)
        there = lanes.reshape(-1, 32)
        whole = there.all(1)
        if whole.any():
            for register, values in run(m, whole):
                old = m.registers[register.number].reshape(-1, 32).copy()
                old[whole] = values
                m.registers[register.number] = old.reshape(-1)
        waiting = lanes & ~np.repeat(whole, 32)
        if not waiting.any():
            return place + 1
        m.pc[m.running] = place + 1
        m.pc[waiting], m.state[waiting] = place, IN_WARP
        return None

    return step


def _members(m, instruction: Instruction, masks: np.ndarray) -> None:
    """Raises Fault unless every lane's mask has all 32 lanes."""
    if (masks != 0xFFFFFFFF).any():
        lane = int(m.lanes_of(instruction).argmax())
        found = int(masks[masks != 0xFFFFFFFF][0])
        raise m.fault(f"a warp's instruction with mask {found:08x}, expected all 32 lanes", instruction, lane)


def shfl(instruction: Instruction) -> Step:
    """shfl.sync."""
    target, *sources = instruction.operands
    register, predicate = target if isinstance(target, tuple) else (target, None)
    readers, mode = [reader(operand, "b32") for operand in sources], instruction.opcode[2]

    def run(m, whole: np.ndarray):
        value, b, c, members = (of_lanes(m, read(m), whole) for read in readers)
        _members(m, instruction, members)
        found, valid = warp.shuffle(mode, value, b, c)
        return [(register, found)] + ([(predicate, valid)] if isinstance(predicate, Register) else [])

    return of_warps(instruction, run)


def vote(instruction: Instruction) -> Step:
    """vote.sync.ballot."""
    if instruction.opcode[2] != "ballot":
        raise PtxError(f"the interpreter does not know {instruction.text}")
    target, predicate, members = instruction.operands
    read, read_members = reader(predicate, "pred"), reader(members, "b32")

    def run(m, whole: np.ndarray):
        _members(m, instruction, of_lanes(m, read_members(m), whole))
        return [(target, warp.ballot(of_lanes(m, read(m), whole)))]

    return of_warps(instruction, run)


def mma(instruction: Instruction) -> Step:
    """mma.sync."""
    target, *sources = instruction.operands
    vectors = [[reader(register, "b32") for register in vector] for vector in sources]

    def run(m, whole: np.ndarray):
        a, b, c = ([of_lanes(m, read(m), whole) for read in vector] for vector in vectors)
        return zip(target, warp.mma(instruction.opcode, a, b, c), strict=True)

    return of_warps(instruction, run)


def trap(instruction: Instruction) -> Step:
    """trap: always a fault."""

    def step(m, place: int) -> int:
        lanes = m.lanes_of(instruction)
        if lanes.any():
            raise m.fault("a trap", instruction, int(lanes.argmax()))
        return place + 1

    return step
