"""Weights as they stand in a folder that is still being written, decoded by the reader of its format."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch

from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import Source
from qcli.formats import Stored
from qcli.quantization.decoding import decode, read_tensor
from qcli.quantization.plan import Plan, Work
from qcli.quantization.staging import Staging


class StagedWeights:
    """The weights of a plan that are written so far. It has what a format reads of a Source."""

    is_hub = False

    def __init__(self, plan: Plan, staging: Staging):
        self._plan, self._staging = plan, staging
        self.label, self.place = str(staging.folder), plan.source.place
        self.tensors = {
            o.name: TensorInfo(o.file, o.name, o.dtype, o.shape, o.start, o.end) for w in plan.quantized for o in w.outputs
        }

    @contextmanager
    def open(self, file: str, parts: Sequence[tuple[int, int]] | None = None) -> Iterator[int]:
        """A file descriptor of a weight file, while this lasts."""
        fd = os.open(self._staging.folder / file, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def again(self, otherwise: str = "") -> str:
        """What to do about a file that another program has damaged."""
        return "Delete the folder to start anew."

    def carried(self, work: Work) -> torch.Tensor:
        """A tensor that is stored as one, in the dtype of the output. Raises CheckpointError."""
        (output,) = work.outputs
        info = TensorInfo(output.file, output.name, output.dtype, output.shape, output.start, output.end)
        return read_tensor(cast(Source, self), info)

    def weight(self, work: Work) -> torch.Tensor:
        """The weight float32 [out_features, in_features] that is stored. Raises CheckpointError."""
        return decode(*self.stored(work))

    def stored(self, work: Work) -> tuple[Stored, dict[str, Any]]:
        """What is stored of a weight, and its tensors by attribute. Raises CheckpointError."""
        assert work.linear is not None
        format, source = self._plan.format, cast(Source, self)
        codes = next(o.name for o in work.outputs if format.weight_name(o.name) == work.info.name)
        linear = replace(work.linear, tensor=codes)
        config = format.config_of(self._plan.quantization_config, codes)
        stored = format.read(source, [linear], config)[linear.module]
        names = {format.attribute(o.name.removeprefix(work.info.name.removesuffix("weight"))): o.name for o in work.outputs}
        tensors: dict[str, Any] = {
            attribute: read_tensor(source, self.tensors[names[attribute]]) for attribute in stored.tensors if attribute in names
        }
        return stored, tensors
