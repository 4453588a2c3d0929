"""Runs a kernel's PTX. There is one lane for each thread of several blocks; a register is a numpy array with an element per lane.

Of the threads that can run, those at the lowest position in the text run together, until they diverge or meet others. (Except for
loops, branches of structured code go forward, so the threads behind catch up.) A warp's instruction waits until all 32 lanes have
arrived, a barrier waits for all threads of the block.
"""

import numpy as np

from tests.ptx.lanes import EXITED, IN_WARP, READY, UNSIGNED, Fault
from tests.ptx.memory import AccessFault, Global, Shared
from tests.ptx.parse import Instruction, Module, Register
from tests.ptx.steps import work_out

MOST_STEPS = 2_000_000  # a kernel with more steps is assumed to run for ever


class Machine:
    """Runs some blocks of a launch. `blocks` int [count, 3] are their numbers, `arguments` is the packed buffer of the launch,
    `dynamic` the dynamic shared memory of a block in bytes."""

    def __init__(
        self,
        module: Module,
        entry: str,
        blocks: np.ndarray,
        grid: tuple,
        threads: int,
        dynamic: int,
        arguments: bytes,
        memory: Global,
    ):
        self.module, self.function = module, module.functions[entry]
        self.threads, self.count = threads, len(blocks) * threads
        self.arguments, self.memory = arguments, memory
        self.shared = Shared(self.function.shared, dynamic, len(blocks), threads)
        self.special = self._special(blocks, grid)
        # A register that was never set is full of ones: a NaN, or an address outside all arrays.
        unset = {bits: np.full(self.count, ~kind(0), kind) for bits, kind in UNSIGNED.items()}
        self.registers = [unset[bits] for bits in module.registers]
        self.pc = np.full(self.count, self.function.first)
        self.state = np.full(self.count, READY, np.int8)
        self.calls: list[tuple[np.ndarray, int]] = []  # (the lanes in a call, where they continue)
        self.group = np.zeros(self.count, np.int64)  # the number of each thread's open group of copies
        self.copies: list[tuple] = []  # unfinished copies, in the form of accesses.py
        self.everyone = np.ones(self.count, bool)
        self.mask: np.ndarray | None = None  # the lanes that run; None if all do
        self.steps = 0

    def _special(self, blocks: np.ndarray, grid: tuple) -> dict[str, np.ndarray]:
        thread = np.tile(np.arange(self.threads, dtype=np.uint32), len(blocks))
        same = lambda value: np.full(self.count, value, np.uint32)  # noqa: E731
        found = {"%laneid": thread % 32, "WARP_SZ": same(32)}
        for axis, letter in enumerate("xyz"):
            found[f"%tid.{letter}"] = same(0) if axis else thread
            found[f"%ntid.{letter}"] = same(1 if axis else self.threads)
            found[f"%ctaid.{letter}"] = np.repeat(blocks[:, axis], self.threads).astype(np.uint32)
            found[f"%nctaid.{letter}"] = same(grid[axis])
        return found

    def run(self) -> None:
        """Runs all blocks. Raises Fault, and PtxError at an unknown instruction."""
        with np.errstate(all="ignore"):
            while (ready := self.state == READY).any():
                place = int(self.pc[ready].min())
                self._go(place, ((self.state == READY) | (self.state == IN_WARP)) & (self.pc == place))
        if (self.state != EXITED).any():
            self._stuck()

    def _go(self, place: int, mask: np.ndarray) -> None:
        """Runs the lanes of `mask`, which are at `place`, until they diverge, wait, or reach others."""
        self.state[mask] = READY
        self.mask = None if mask.all() else mask
        ahead = self.pc[(self.state == READY) & ~mask]
        limit = int(ahead.min()) if len(ahead) else len(self.module.instructions)
        meeting = set(self.pc[self.state == IN_WARP].tolist())
        while True:
            instruction = self.module.instructions[place]
            self.steps += 1
            if self.steps > MOST_STEPS:
                raise self.fault(f"no end after {MOST_STEPS} instructions", instruction, int(mask.argmax()))
            try:
                following = (instruction.step or work_out(instruction))(self, place)
            except AccessFault as e:
                lane = int(np.flatnonzero(self.lanes_of(instruction))[e.place])
                raise self.fault(str(e), instruction, lane) from None
            if following is None:
                return
            place = following
            if place >= limit or place in meeting:
                break
        self.pc[mask] = place

    @property
    def running(self) -> np.ndarray:
        """bool [lanes]: the lanes that run."""
        return self.everyone if self.mask is None else self.mask

    def lanes_of(self, instruction: Instruction) -> np.ndarray:
        """bool [lanes]: the running lanes whose guard is true."""
        if not instruction.guard:
            return self.running
        register, negated = instruction.guard
        return self.running & (self.registers[register.number] ^ negated)

    def write(self, register: Register, values: np.ndarray, instruction: Instruction) -> None:
        """Sets a register in the lanes that run the instruction. `values` has the register's own unsigned type, for every lane."""
        if self.mask is None and not instruction.guard:
            self.registers[register.number] = np.broadcast_to(values, self.count)
        else:
            lanes = self.lanes_of(instruction)
            self.registers[register.number] = np.where(lanes, values, self.registers[register.number])

    def fault(self, message: str, instruction: Instruction, lane: int) -> Fault:
        """A Fault that says where it happened."""
        block = tuple(int(self.special[f"%ctaid.{letter}"][lane]) for letter in "xyz")
        where = f"{self.function.name}, {instruction.line}, block {block}, thread {lane % self.threads}"
        return Fault(f"{where}: {message} ({instruction.text})")

    def _stuck(self) -> None:
        """Raises the Fault for threads that all wait."""
        lane = int((self.state != EXITED).argmax())
        instruction = self.module.instructions[self.pc[lane]]
        of, size = ("a warp", 32) if self.state[lane] == IN_WARP else ("a block", self.threads)
        peers = slice(lane // size * size, lane // size * size + size)
        here = int(((self.pc[peers] == self.pc[lane]) & (self.state[peers] == self.state[lane])).sum())
        gone = int((self.state[peers] == EXITED).sum())
        message = f"divergent barrier: {here} of {size} threads of {of} wait here, {gone} have returned"
        raise self.fault(message, instruction, lane)
