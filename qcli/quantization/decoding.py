"""From stored codes back to weights, module by module: what `dequantize` writes, and what `quantize` reads of a checkpoint in
FP8."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from qcli import formats
from qcli.checkpoint import dtypes
from qcli.checkpoint.safetensors_file import TensorInfo, read_into
from qcli.checkpoint.source import Source
from qcli.formats import Stored
from qcli.methods._blockwise import decode_blocks
from qcli.methods._groups import decode_groups
from qcli.methods._int8 import decode_rows
from qcli.methods._tables import decode_tables
from qcli.schemes import FP8_BLOCK


def read_tensor(source: Source, info: TensorInfo) -> torch.Tensor:
    """A stored tensor, whole. Raises CheckpointError, HubError."""
    data = bytearray(info.nbytes)
    with source.open(info.file, [(info.start, info.end)]) as fd:
        read_into(fd, info.start, memoryview(data))
    if not data:
        return torch.empty(tuple(info.shape), dtype=dtypes.torch_dtype(info.dtype))
    return torch.frombuffer(data, dtype=dtypes.torch_dtype(info.dtype)).view(tuple(info.shape))


def decode(stored: Stored, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight float32 [out_features, in_features] of the tensors of a module, by attribute. In 16 bits it is what the format's
    own library makes of them: a product in float32, rounded once."""
    parts, scheme = formats.unpack(stored, tensors), stored.scheme
    shape = stored.out_features, stored.in_features
    if scheme.share == "flat":
        return decode_blocks(parts, scheme.size, scheme.codebook or "", *shape)
    if scheme.codebook == "table":
        return decode_tables(parts, *shape)
    if stored.format == "bitsandbytes":
        return decode_rows(parts, *shape)
    if (group := parts.get("group_of_column")) is not None:
        order = group.long().argsort(stable=True)
        values = decode_groups(scheme, parts | {"codes": parts["codes"][:, order].contiguous()}, *shape)
        return torch.empty_like(values).index_copy_(1, order, values)
    return decode_groups(scheme, parts, *shape)


def block_scales(source: Source, info: TensorInfo) -> "BlockScales | None":
    """The scales of a weight in FP8; None for any other tensor. Raises CheckpointError, HubError."""
    scale = source.scales.get(info.name)
    if scale is None or info.dtype != "F8_E4M3" or source.quantization is None:
        return None
    size, _ = source.quantization.get("weight_block_size") or (FP8_BLOCK, FP8_BLOCK)
    return BlockScales(size, read_tensor(source, scale).float())


@dataclass
class BlockScales:
    """The scales of a weight in FP8, float32 [block rows, block columns], of squares of `size`, as chunks of rows meet them."""

    size: int
    scale: torch.Tensor

    def rows(self, codes: torch.Tensor, first: int) -> torch.Tensor:
        """The values float32 of codes [rows, in_features] that begin at row `first`."""
        block = torch.arange(first, first + len(codes), device=codes.device) // self.size
        wide = self.scale.to(codes.device)[block].repeat_interleave(self.size, 1)[:, : codes.shape[1]]
        return codes.float() * wide
