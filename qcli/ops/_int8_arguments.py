"""What CUDA kernels of an int8 weight take, checked."""

import torch

from qcli.runtime import cuda


def kernel_arguments(
    op: str, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, groups: int = 1
) -> tuple[tuple[str, ...], torch.Tensor, torch.Tensor, torch.Tensor | int]:
    """(the constants that CUDA kernels of an int8 weight are compiled with, weight, scale, bias), checked for the kernels. A row
    has `groups` scales. bias is 0 if there is none. Raises TypeError, ValueError."""
    constants, rows = (f"DTYPE={cuda.type_name(op, x)}",), weight.shape[0]
    weight = cuda.require(op, "weight", weight, torch.int8, rows * x.shape[-1], x.device)
    scale = cuda.require(op, "scale", scale.float(), torch.float32, rows * groups, x.device)
    if bias is None:
        return constants, weight, scale, 0
    if bias.dtype != x.dtype:
        constants += (f"BIAS={cuda.type_name(op, bias, 'bias')}",)
    return constants, weight, scale, cuda.require(op, "bias", bias, bias.dtype, rows, x.device)
