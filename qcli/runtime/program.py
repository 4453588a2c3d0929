"""A list of ops over tensors at fixed addresses, which the CPU library runs for every token without Python between them."""

import ctypes

import torch

from qcli.runtime import cpu


class _Op(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_void_p), ("record", ctypes.c_void_p)]


class Program:
    """Ops in their order. Each is a kernel with QCLI_STEP's parameters (kernels/cpu/common.h) and its record.

    The kernels are those of the variant that is in use when the program is made.
    """

    def __init__(self, ops: list[tuple[str, cpu.Record]]):
        library, variant = cpu.library(), cpu.variant()
        self._records = [record for _, record in ops]  # keeps the tensors alive
        addresses = [ctypes.cast(getattr(library, f"qcli_{name}_{variant}"), ctypes.c_void_p).value for name, _ in ops]
        self._ops = (_Op * len(ops))(*((address, record.address) for address, record in zip(addresses, self._records)))
        self._run = library.qcli_run
        self._run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self._run.restype = None

    def run(self, tokens: int, start: int, ops: slice = slice(None)) -> None:
        """Runs the ops, or some of them, for `tokens` tokens, the first of which has the position `start` in the text."""
        first, last, _ = ops.indices(len(self._ops))
        address = ctypes.addressof(self._ops) + first * ctypes.sizeof(_Op)
        self._run(address, last - first, tokens, start, torch.get_num_threads())
