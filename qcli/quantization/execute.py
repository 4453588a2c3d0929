"""Carries a plan out: reads a chunk, quantizes it, writes it at its planned place; several at a time, memory bounded."""

import json
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from qcli.checkpoint import dtypes
from qcli.checkpoint.safetensors_file import read_columns, read_into
from qcli.errors import NonFiniteError
from qcli.files.foreign_json import read_object
from qcli.methods._method import Encoder, Parts
from qcli.methods.errors import ErrorSums
from qcli.quantization.absmax import AbsmaxReader
from qcli.quantization.bands import Bands
from qcli.quantization.decoding import block_scales
from qcli.quantization.outputs import weight_of
from qcli.quantization.pipeline import Pipeline
from qcli.quantization.plan import Plan, Work
from qcli.quantization.shard_files import ShardFiles
from qcli.schemes import CHUNK_BYTES


def execute(
    plan: Plan,
    staging: ShardFiles,
    device: torch.device,
    advance: Callable[[int, str], None],
    tasks_of: Callable[..., Iterator[Callable[[], None]]] | None = None,
    only: Collection[int] | None = None,
) -> None:
    """Runs every unit that the journal does not name, of those in `only` if that is given. `advance` hears of source bytes as they
    are finished. `tasks_of` makes the tasks of a piece of work from the arguments of WorkTasks, whose own they are without it.

    Chunks go through as many threads as torch has and one more, each reading, quantizing and writing its own: one computes
    while another waits for the disk. Kernels run on one thread meanwhile.

    Raises NonFiniteError at the first tensor with NaN or infinity, CheckpointError for what goes wrong on disk.
    """
    wanted = [w for w in plan.work if only is None or w.index in only]
    staging.open_shards({o.file for w in wanted for o in w.outputs} if only is not None else None)
    telling, absmax = threading.Lock(), AbsmaxReader(plan)

    def tell(count: int, name: str) -> None:
        with telling:
            advance(count, name)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for file in plan.source.files:
            work = [w for w in wanted if w.info.file == file and w.index not in staging.done]
            if work:
                # The file is closed once no thread reads from it, whatever ends this.
                parts = None if only is None else [(w.info.start, w.info.end) for w in work]
                with plan.source.open(file, parts) as fd, Pipeline(threads + 1) as pipeline:
                    for each in work:
                        for task in (tasks_of or quantizing)(plan, staging, device, tell, fd, each, absmax.of(each)):
                            pipeline.submit(task)
                staging.sync()
            plan.source.release(file)
    finally:
        torch.set_num_threads(threads)
    staging.sync()


def quantizing(*arguments: Any) -> Iterator[Callable[[], None]]:
    """The tasks of WorkTasks."""
    return WorkTasks(*arguments).tasks()


class WorkTasks:
    """The tasks of one piece of work, a chunk each, for threads that run several at a time. The last to end finishes the work."""

    _buffers = threading.local()

    def __init__(
        self,
        plan: Plan,
        staging: ShardFiles,
        device: torch.device,
        advance: Callable[[int, str], None],
        fd: int,
        work: Work,
        absmax: float,
    ):
        self.plan, self.staging, self.device = plan, staging, device
        self.advance, self.fd, self.work = advance, fd, work
        self.lock = threading.Lock()
        self.nonfinite = self.overflowed = 0
        self.places = {o.name: o for o in work.outputs}
        self.bands: dict[str, Bands] = {}
        self.encoder: Encoder | None = None
        self.scales = block_scales(plan.source, work.info)
        if work.linear and work.method:
            self.linear, self.scheme = work.linear, work.method.scheme
            self.weight = weight_of(work.info, work.linear, work.method, plan.dtype)
            shape, method = (work.linear.out_features, work.linear.in_features), cast(Any, work.method)
            self.encoder = method.encoder(*shape, device, absmax)
            if work.columns:
                self.encoder = method.encoder_with(work.columns, *shape, device, self.weight.dtype)

    def tasks(self) -> Iterator[Callable[[], None]]:
        """Every chunk once, in any order; one task with nothing in it for an empty tensor."""
        count: Callable[[int, int], None] = self._bytes
        step, size = CHUNK_BYTES, self.work.info.nbytes
        if self.encoder:
            count, step, size = partial(self._elements, self.encoder), self._grain(self.encoder), self.work.info.numel
        elif self.scales:
            count, size = self._decoded, self.work.info.numel
            step = max(CHUNK_BYTES // self.work.info.shape[1], 1) * self.work.info.shape[1]
        starts = range(0, size, step) or [0]
        self.step, self.left = step, len(starts)
        for start in starts:
            yield partial(self._task, count, start, min(step, size - start))

    def _task(self, work: Callable[[int, int], None], start: int, count: int) -> None:
        if count:
            work(start, count)
        with self.lock:
            self.left -= 1
            last = not self.left
        if last:
            self._finish()

    def _grain(self, encoder: Encoder) -> int:
        """Elements of the weight in its logical order that are a chunk that the method can take."""
        linear, grain = self.linear, encoder.grain
        if linear.transposed or self.scales or self.plan.format.rows_together > 1:
            grain = math.lcm(grain, self.plan.format.rows_together * linear.in_features)
        return max(CHUNK_BYTES // dtypes.ITEMSIZE[self.work.info.dtype] // grain, 1) * grain

    def _elements(self, encoder: Encoder, first: int, count: int) -> None:
        """Quantizes elements of the weight [out_features, in_features] from `first` on."""
        info, linear = self.work.info, self.linear
        dtype, itemsize = dtypes.torch_dtype(info.dtype), dtypes.ITEMSIZE[info.dtype]
        view = self._buffer(count * itemsize)
        if linear.transposed:
            row, rows = first // linear.in_features, count // linear.in_features
            read_columns(self.fd, info, row, row + rows, view)
            chunk = torch.frombuffer(view, dtype=dtype).view(linear.in_features, rows).t().contiguous()
        else:
            read_into(self.fd, info.start + first * itemsize, view)
            chunk = torch.frombuffer(view, dtype=dtype)
        stored = chunk.to(self.device)
        if self.scales:
            stored = self.scales.rows(stored.view(-1, linear.in_features), first // linear.in_features).view(-1)
        entering = stored.to(dtypes.torch_dtype(self.weight.dtype))
        self._count(overflowed=_newly_nonfinite(stored, entering))
        self._pack(encoder.feed(entering, first), first)
        self._advance(len(view))

    def _decoded(self, first: int, count: int) -> None:
        """Carries over elements of a weight in FP8, with their scales, in the dtype that the plan says."""
        (output,), columns = self.work.outputs, self.work.info.shape[1]
        view = self._buffer(count)
        read_into(self.fd, self.work.info.start + first, view)
        codes = torch.frombuffer(view, dtype=torch.float8_e4m3fn).view(-1, columns)
        values = self.scales.rows(codes, first // columns) if self.scales else codes.float()
        cast = values.to(dtypes.torch_dtype(output.dtype))
        self._count(nonfinite=_nonfinite(values), overflowed=_newly_nonfinite(values, cast))
        self._write(output.name, first * cast.itemsize, cast)
        self._advance(count)

    def _bytes(self, first: int, count: int) -> None:
        """Carries over bytes of the tensor as stored, in another dtype where the plan says so."""
        info, (output,) = self.work.info, self.work.outputs
        view = self._buffer(count)
        read_into(self.fd, info.start + first, view)
        if output.dtype not in dtypes.FLOATS:
            self.staging.write(output.file, output.start + first, view)
        else:
            stored = torch.frombuffer(view, dtype=dtypes.torch_dtype(info.dtype))
            cast = stored.to(dtypes.torch_dtype(output.dtype))
            self._count(nonfinite=_nonfinite(stored), overflowed=_newly_nonfinite(stored, cast))
            self._write(output.name, first // stored.itemsize * cast.itemsize, cast)
        self._advance(count)

    def _buffer(self, size: int) -> memoryview:
        """Memory of the thread's own, used again for its next chunk."""
        if len(getattr(self._buffers, "bytes", b"")) < size:
            self._buffers.bytes = bytearray(max(size, CHUNK_BYTES))
        return memoryview(self._buffers.bytes)[:size]

    def _count(self, nonfinite: int = 0, overflowed: int = 0) -> None:
        if nonfinite or overflowed:
            with self.lock:
                self.nonfinite += nonfinite
                self.overflowed += overflowed

    def _pack(self, parts: Parts, first: int) -> None:
        for piece in self.plan.format.pack(self.weight, self.scheme, parts, first):
            self._write(piece.tensor, piece.offset, piece.data, piece.stride)

    def _write(self, output: str, offset: int, tensor: torch.Tensor, stride: int = 0) -> None:
        if stride and tensor.numel():
            self._band(output, stride).add(offset, tensor)
        else:
            place = self.places[output]
            self.staging.write(place.file, place.start + offset, _bytes(tensor))

    def _band(self, output: str, stride: int) -> Bands:
        """What collects columns of `output`, whose rows have `stride` bytes: for each output row of the weight as many."""

        def write(offset: int, data: memoryview, row: int) -> None:
            self.staging.write_rows(self.places[output].file, self.places[output].start + offset, data, row, stride)

        with self.lock:
            if output not in self.bands:
                width = stride * (self.step // self.linear.in_features) // self.linear.out_features
                self.bands[output] = Bands(stride, min(width, stride), write)
            return self.bands[output]

    def _advance(self, count: int) -> None:
        self.advance(count, self.work.info.name)

    def _finish(self) -> None:
        errors, work = ErrorSums(nonfinite=self.nonfinite), self.work
        if self.overflowed and not self.plan.allow_nonfinite:
            target = self.weight.dtype if self.encoder else work.outputs[0].dtype
            raise NonFiniteError(
                f"{work.info.name}: {self.overflowed:,} values, stored {work.info.dtype}, are too large for "
                f"{dtypes.TORCH_NAMES[target]}",
                "Choose --dtype bfloat16 or float32.",
            )
        if self.encoder:
            parts, errors = self.encoder.finish()
            self._pack(parts, 0)
        if errors.nonfinite and not self.plan.allow_nonfinite:
            raise NonFiniteError(
                f"{work.info.name} holds {errors.nonfinite:,} NaN or infinite values among {work.info.numel:,}"
                f" (stored {work.info.dtype})",
                f"{self._what_is_lost()} To go on all the same: --set allow_nonfinite=true. Finished work is kept.",
            )
        self.staging.finish_work(work.index, errors)

    def _what_is_lost(self) -> str:
        if not self.encoder:
            return "It is not quantized, and would be carried over with them."
        scheme = self.scheme
        nested = "; with double quantization, the 256 blocks around it" if scheme.double_quant else ""
        what = {"row": "row", "flat": "block", "group": "group", "block": "block"}
        shares = {share: f"{scheme.bits}-bit {name}" for share, name in what.items()}
        return f"The {shares.get(scheme.share, 'tensor')} that holds one is lost whole{nested}."


def _nonfinite(x: torch.Tensor) -> int:
    """Elements that are NaN or infinite. Where there are none, which is nearly always, least and greatest tell at once."""
    if x.dtype.itemsize == 1:  # float8, for which torch has no such kernels
        x = x.float()
    if not x.numel() or all(bound.isfinite() for bound in torch.aminmax(x)):
        return 0
    return int((~torch.isfinite(x)).sum())


def _newly_nonfinite(before: torch.Tensor, after: torch.Tensor) -> int:
    if before.dtype == after.dtype or not _nonfinite(after):
        return 0
    return int((torch.isfinite(before.float()) & ~torch.isfinite(after)).sum())


def _bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def verify(plan: Plan, folder: Path) -> None:
    """Reopens a written folder and compares it with the plan, header by header. Raises CheckpointError."""
    from qcli.checkpoint.safetensors_file import read_header
    from qcli.errors import CheckpointError

    for shard in plan.shards:
        path = folder / shard.name
        found = read_header(path).tensors
        expected = {o.name: o for w in plan.work for o in w.outputs if o.file == shard.name}
        size = os.stat(path).st_size
        same = found.keys() == expected.keys() and size == shard.size
        for name in found if same else ():
            a, b = found[name], expected[name]
            same = same and (a.dtype, tuple(a.shape), a.start, a.end) == (b.dtype, b.shape, b.start, b.end)
        if not same:
            raise CheckpointError(f"{path} is not what was planned", "The disk or another program changed it: delete the folder.")
    config = read_object(folder / "config.json", f"{folder}/config.json", "Delete the folder and run again.")
    if config != json.loads(json.dumps(plan.config)):
        raise CheckpointError(f"{folder}/config.json is not what was planned", "Delete the folder and run again.")
