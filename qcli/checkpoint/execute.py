"""Carries a plan out: reads a chunk, quantizes it, writes it at its planned place; unit after unit, memory bounded."""

import json
import math
import os
from collections.abc import Callable

import torch

from qcli.checkpoint import dtypes
from qcli.checkpoint.plan import CHUNK_BYTES, Plan, Unit, quantized_dtype
from qcli.checkpoint.safetensors_file import read_columns, read_into
from qcli.checkpoint.staging import Staging
from qcli.errors import NonFiniteError
from qcli.methods._base import ErrorSums


def execute(plan: Plan, staging: Staging, device: torch.device, advance: Callable[[int, str], None]) -> None:
    """Runs every unit that the journal does not name. `advance` hears of source bytes as they are finished.

    Raises NonFiniteError at the first tensor with NaN or infinity, CheckpointError for what goes wrong on disk.
    """
    staging.open_shards()
    runner = _Runner(plan, staging, device, advance)
    for file in plan.source.files:
        units = [u for u in plan.units if u.file == file and u.index not in staging.done]
        if units:
            with plan.source.open(file) as fd:
                for unit in units:
                    staging.finish_unit(unit.index, runner.run(fd, unit))
            staging.sync()
        plan.source.release(file)
    staging.sync()


class _Runner:
    def __init__(self, plan: Plan, staging: Staging, device: torch.device, advance: Callable[[int, str], None]):
        self.plan, self.staging, self.device, self.advance = plan, staging, device, advance
        self.buffer = bytearray(CHUNK_BYTES)

    def run(self, fd: int, unit: Unit) -> ErrorSums:
        errors = self._quantize(fd, unit) if unit.linear else self._carry_over(fd, unit)
        if errors.nonfinite and not self.plan.allow_nonfinite:
            raise NonFiniteError(
                f"{unit.info.name} holds {errors.nonfinite:,} NaN or infinite values among {unit.info.numel:,}"
                f" (stored {unit.info.dtype})",
                "The 4-bit block or int8 row that holds one is lost whole; with double quantization, the 256 blocks around it. "
                "To go on all the same: --set allow_nonfinite=true. Finished work is kept.",
            )
        return errors

    def _quantize(self, fd: int, unit: Unit) -> ErrorSums:
        linear, method, name = unit.linear, self.plan.method, unit.info.name
        enters_as = quantized_dtype(unit.info, method, self.plan.dtype)
        stream = method.stream(name, linear.out_features, linear.in_features, enters_as, self.device)
        places = {o.name: o.start for o in unit.outputs}
        overflowed = 0
        for chunk in self._chunks(fd, unit):
            stored = chunk.to(self.device)
            entering = stored.to(dtypes.torch_dtype(enters_as))
            overflowed += _newly_nonfinite(stored, entering)
            for output, piece in stream.feed(entering):
                data = _bytes(piece)
                self.staging.write(self._file(unit), places[output], data)
                places[output] += len(data)
            self.advance(chunk.numel() * dtypes.ITEMSIZE[unit.info.dtype], name)
        self._refuse_overflow(unit, overflowed, enters_as)
        result = stream.finish()
        for output, tensor in result.tensors.items():
            self.staging.write(self._file(unit), places[output], _bytes(tensor))
        return result.errors

    def _carry_over(self, fd: int, unit: Unit) -> ErrorSums:
        (output,) = unit.outputs
        errors, place, overflowed = ErrorSums(), output.start, 0
        if output.dtype not in dtypes.FLOATS:
            for view in self._pieces(fd, unit.info.start, unit.info.nbytes):
                self.staging.write(output.file, place, view)
                place += len(view)
                self.advance(len(view), unit.info.name)
            return errors
        target = dtypes.torch_dtype(output.dtype)
        for view in self._pieces(fd, unit.info.start, unit.info.nbytes):
            stored = torch.frombuffer(view, dtype=dtypes.torch_dtype(unit.info.dtype))
            cast = stored.to(target)
            errors.nonfinite += int((~torch.isfinite(stored)).sum())
            overflowed += _newly_nonfinite(stored, cast)
            data = _bytes(cast)
            self.staging.write(output.file, place, data)
            place += len(data)
            self.advance(len(view), unit.info.name)
        self._refuse_overflow(unit, overflowed, output.dtype)
        return errors

    def _refuse_overflow(self, unit: Unit, count: int, dtype: str) -> None:
        if count and not self.plan.allow_nonfinite:
            raise NonFiniteError(
                f"{unit.info.name}: {count:,} values, stored {unit.info.dtype}, are too large for {dtypes.TORCH_NAMES[dtype]}",
                "Choose --dtype bfloat16 or float32.",
            )

    def _pieces(self, fd: int, start: int, nbytes: int):
        """The bytes of a tensor, one buffer's length at a time."""
        for offset in range(start, start + nbytes, CHUNK_BYTES):
            view = memoryview(self.buffer)[: min(CHUNK_BYTES, start + nbytes - offset)]
            read_into(fd, offset, view)
            yield view

    def _chunks(self, fd: int, unit: Unit):
        """The weight in its logical order [out_features, in_features], in chunks that the method can take."""
        info, linear = unit.info, unit.linear
        dtype, itemsize = dtypes.torch_dtype(info.dtype), dtypes.ITEMSIZE[info.dtype]
        grain = self.plan.method.granularity(linear.in_features)
        if linear.transposed:
            grain = math.lcm(grain, linear.in_features)
        step = max(CHUNK_BYTES // itemsize // grain, 1) * grain
        if step * itemsize > len(self.buffer):
            self.buffer = bytearray(step * itemsize)
        for first in range(0, info.numel, step):
            count = min(step, info.numel - first)
            view = memoryview(self.buffer)[: count * itemsize]
            if linear.transposed:
                row, rows = first // linear.in_features, count // linear.in_features
                read_columns(fd, info, row, row + rows, view)
                yield torch.frombuffer(view, dtype=dtype).view(linear.in_features, rows).t().contiguous()
            else:
                read_into(fd, info.start + first * itemsize, view)
                yield torch.frombuffer(view, dtype=dtype)

    def _file(self, unit: Unit) -> str:
        return unit.outputs[0].file


def _newly_nonfinite(before: torch.Tensor, after: torch.Tensor) -> int:
    if before.dtype == after.dtype:
        return 0
    return int((torch.isfinite(before) & ~torch.isfinite(after)).sum())


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def verify(plan: Plan, folder) -> None:
    """Reopens a written folder and compares it with the plan, header by header. Raises CheckpointError."""
    from qcli.checkpoint.safetensors_file import read_header
    from qcli.errors import CheckpointError

    for shard in plan.shards:
        path = folder / shard.name
        found = read_header(path).tensors
        expected = {o.name: o for u in plan.units for o in u.outputs if o.file == shard.name}
        size = os.stat(path).st_size
        same = found.keys() == expected.keys() and size == shard.size
        for name in found if same else ():
            a, b = found[name], expected[name]
            same = same and (a.dtype, tuple(a.shape), a.start, a.end) == (b.dtype, b.shape, b.start, b.end)
        if not same:
            raise CheckpointError(
                f"{path} is not what was planned", "The disk or another program changed it: delete the folder."
            )
    config = json.loads((folder / "config.json").read_text())
    if config != json.loads(json.dumps(plan.config)):
        raise CheckpointError(f"{folder}/config.json is not what was planned", "Delete the folder and run again.")
