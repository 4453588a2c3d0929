"""Runs the kernels of an op over its cases, on the emulator with sanitizers, in every order, and compares with the reference.

    python -m tests.emulator.check FOLDER OP all      compiled kernels are kept in FOLDER

Without "all" each case runs in one order, the next case in the next one.

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
from tests.parity import disagreement

# Ops that take another path for many tokens on GPUs with less shared memory, or without wgmma.
TWO_WAYS = {"linear_4bit", "linear_int8"}
MANY = 8


def main(folder: str, name: str, cases: str = "") -> None:
    """Checks one op."""
    torch.set_num_threads(1)
    emulator = Emulator(Path(folder), sanitize=True)
    op = import_module(f"qcli.ops.{name}")
    launches = 0
    with cuda.using(emulator), cpu.using(None):
        for number, (case, arguments) in enumerate(op.cases()):
            orders = list(ORDERS) if cases == "all" else [list(ORDERS)[number % len(ORDERS)]]
            expected = op._reference(**arguments)
            many = name in TWO_WAYS and arguments["x"].shape[:-1].numel() > MANY
            for emulator.of in [(9, 0), (8, 6)] if many else [(9, 0)]:
                for emulator.order in orders:
                    wrong = disagreement(name, arguments, op._cuda(**arguments), expected)
                    launches += 1
                    if wrong:
                        print(f"{name} {case}, {emulator.order}, capability {emulator.of}: {wrong}")
    print(json.dumps({"launches": launches, "kernels": sorted(emulator.launched)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
