"""The absmax of whole weights, which some methods need before the first chunk. The weights are read once more for it."""

import torch

from qcli.checkpoint import dtypes
from qcli.checkpoint.safetensors_file import read_into
from qcli.formats._selection import fused_parts
from qcli.quantization.decoding import block_scales
from qcli.quantization.plan import Plan, Work
from qcli.schemes import CHUNK_BYTES


class AbsmaxReader:
    """Reads each weight of a plan at most once."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._by_module = {w.linear.module: w for w in plan.work if w.linear and w.method and w.method.needs_absmax}
        self._found: dict[str, float] = {}

    def of(self, work: Work) -> float:
        """The largest finite magnitude of a weight in the dtype in which it is quantized, and of all weights with which readers
        fuse it and which need one, too: those share the scale that is made of it. Raises CheckpointError, HubError."""
        if work.linear is None or work.method is None or not work.method.needs_absmax:
            return 0.0
        members = [self._by_module[name] for name in fused_parts(work.linear.module) if name in self._by_module]
        return max(self._of_one(member) for member in members or [work])

    def _of_one(self, work: Work) -> float:
        info = work.info
        if info.name not in self._found:
            itemsize, largest = dtypes.ITEMSIZE[info.dtype], 0.0
            step = CHUNK_BYTES // itemsize * itemsize
            entering = dtypes.torch_dtype(self._plan.dtype)
            scales = block_scales(self._plan.source, info)
            if scales:
                step = max(step // info.shape[1], 1) * info.shape[1]
            with self._plan.source.open(info.file, [(info.start, info.end)]) as fd:
                for start in range(0, info.nbytes, step):
                    data = bytearray(min(step, info.nbytes - start))
                    read_into(fd, info.start + start, memoryview(data))
                    chunk = torch.frombuffer(data, dtype=dtypes.torch_dtype(info.dtype))
                    if scales:
                        chunk = scales.rows(chunk.view(-1, info.shape[1]), start // info.shape[1])
                    chunk = chunk.to(entering).float()
                    largest = max(largest, float(chunk.nan_to_num_(0.0, 0.0, 0.0).abs_().max()))
            self._found[info.name] = largest
        return self._found[info.name]
