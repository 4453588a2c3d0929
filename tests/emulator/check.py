"""Runs the kernels of an op over its cases, on the emulator with sanitizers, and compares them with the reference.

    python -m tests.emulator.check FOLDER OP all      compiled kernels are kept in FOLDER

With "all" every case runs, in every order. Without it the cases run for which few kernels need to be compiled: every constant is
compiled into some kernel, but not with every other, and every kernel is there. Each case then runs in one order, the next case in
the next one.

Prints a line for each disagreement, and at the end which kernels ran, as JSON. It runs in a separate process, because a sanitizer
must be loaded first and ends the process at the first error.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch

from qcli.runtime import cpu, cuda
from tests.emulator.emulator import ORDERS, Emulator
from tests.parity import disagreement, results

# Ops that take another path for many tokens on GPUs with less shared memory, or without wgmma.
TWO_WAYS = {"linear_4bit", "linear_int8"}
MANY = 8


class Recorder(Emulator):
    """Notes which kernels an op asks for, as (file, name, constants). Compiles and runs nothing."""

    def __init__(self):
        super().__init__(Path())
        self.asked: set[tuple[str, str, tuple[str, ...]]] = set()

    def function(self, source: str, entry: str, constants: tuple[str, ...], device: torch.device):
        self.asked.add((source, entry, constants))
        return entry, None

    def launch(self, *arguments) -> None:
        pass


def capabilities(name: str, arguments: dict) -> list[tuple[int, int]]:
    """The compute capabilities whose paths a case takes."""
    many = name in TWO_WAYS and arguments["x"].shape[:-1].numel() > MANY
    return [(9, 0), (8, 6)] if many else [(9, 0)]


def spared(op, name: str) -> list[tuple[str, dict]]:
    """The cases that need no more compiled kernels than it takes to have each constant in one of them."""
    needs = []
    for case, arguments in op.cases():
        recorder = Recorder()
        with cuda.using(recorder):
            for recorder.of in capabilities(name, arguments):
                op._cuda(**arguments)
        needs.append((case, arguments, recorder.asked))
    compiled: set = set()

    def constants(kernels):
        return {(source, constant) for source, entry, found in kernels for constant in (entry, *found)}

    while more := max((asked for *_, asked in needs), key=lambda asked: len(constants(asked) - constants(compiled))) - compiled:
        if not constants(more) - constants(compiled):
            break
        compiled |= more
    return [(case, arguments) for case, arguments, asked in needs if asked <= compiled]


def main(folder: str, name: str, cases: str = "") -> None:
    """Checks one op."""
    torch.set_num_threads(1)
    emulator = Emulator(Path(folder), sanitize=True)
    op = import_module(f"qcli.ops.{name}")
    launches = 0
    with cuda.using(emulator), cpu.using(None):
        for number, (case, arguments) in enumerate(op.cases() if cases == "all" else spared(op, name)):
            orders = list(ORDERS) if cases == "all" else [list(ORDERS)[number % len(ORDERS)]]
            expected = results(name, op._reference, arguments)
            for emulator.of in capabilities(name, arguments):
                for emulator.order in orders:
                    wrong = disagreement(name, arguments, results(name, op._cuda, arguments), expected)
                    launches += 1
                    if wrong:
                        print(f"{name} {case}, {emulator.order}, capability {emulator.of}: {wrong}")
    print(json.dumps({"launches": launches, "kernels": sorted(emulator.launched)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
