"""The functions that run instructions, by the first word of the opcode. All other instructions are arithmetic."""

from tests.ptx import accesses, control, values
from tests.ptx.parse import Instruction

_STEPS = {
    "atom": accesses.atom,
    "bar": control.barrier,
    "barrier": control.barrier,
    "bra": control.bra,
    "call": control.call,
    "cp": accesses.copy,
    "cvta": values.cvta,
    "exit": control.ret,
    "ld": accesses.load,
    "ldmatrix": accesses.ldmatrix,
    "mma": control.mma,
    "mov": values.mov,
    "ret": control.ret,
    "shfl": control.shfl,
    "st": accesses.store,
    "trap": control.trap,
    "vote": control.vote,
}


def work_out(instruction: Instruction) -> values.Step:
    """The instruction's step, which is then kept in it. Raises PtxError."""
    instruction.step = _STEPS.get(instruction.opcode[0], values.arithmetic)(instruction)
    return instruction.step
