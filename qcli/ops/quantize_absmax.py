"""Double quantization (QLoRA, arXiv:2305.14314, section 3): the absmax values of a weight, minus their mean, in 8 bits.

y = absmax - offset, in groups of 256. The code is that of the entry of the dynamic map that is exactly nearest to
y * (1 / max|y|); a tie takes the lower one. This is the rule of bitsandbytes' CUDA kernel. Its CPU path first rounds to one of
65536 steps, and so gives some values a neighbouring code: 0.24% of them for a normal weight, 1% if each group has an outlier of
ten times the size.

A group whose y are all zero has nested_absmax 0 and the code of 0.0. Where 0 < max|y| < 1e-38, the quotient y / max|y| replaces
the product. A NaN or an infinity in absmax affects only its own group.

The offset is the mean of the finite absmax values. They are summed in float64 by folding: pad with zeros to a power of two, then
add the upper half to the lower half until one value is left. Unlike a reduction, this sum depends on neither threads nor device.
"""

import numpy as np
import torch

from qcli import codebooks
from qcli.ops._library import blocks, define
from qcli.runtime import cpu, cuda

GROUP_SIZE = 256


def mean_absmax(absmax: torch.Tensor) -> float:
    """The offset of absmax float32 [n]: the mean of its finite values, rounded to float32; 0.0 if there are none."""
    if absmax.is_cpu and cpu.variant():
        return _folded(absmax)
    finite = torch.isfinite(absmax)
    count = int(finite.sum())
    if count == 0:
        return 0.0
    kept = absmax.masked_fill(~finite, 0.0)
    half = max(1, (1 << (kept.numel() - 1).bit_length()) // 2)
    folded = kept[:half].double()
    folded[: kept.numel() - half] += kept[half:]  # the padding adds nothing
    while half > 1:
        half //= 2
        folded = folded[:half] + folded[half:]
    return float(np.float32(folded.item() / count))


_fold = cpu.kernel("fold_absmax", "pqqppp")


def _folded(absmax: torch.Tensor) -> float:
    absmax, count = cpu.require("mean_absmax", "absmax", absmax, torch.float32, absmax.numel()), absmax.numel()
    half = max(1, (1 << (count - 1).bit_length()) // 2)
    scratch, total = torch.empty(half, dtype=torch.float64), torch.empty((), dtype=torch.float64)
    finite = torch.empty((), dtype=torch.int64)
    _fold(absmax, count, half, scratch, total, finite)
    return float(np.float32(total.item() / finite.item())) if finite else 0.0


def _reference(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    count = absmax.numel()
    groups = torch.nn.functional.pad(absmax - offset, (0, -count % GROUP_SIZE)).view(-1, GROUP_SIZE)
    nested_absmax = groups.abs().amax(1)
    scaled = groups * (1.0 / nested_absmax).unsqueeze(1)
    small = nested_absmax < 1e-38
    scaled[small] = (groups[small] / nested_absmax[small].unsqueeze(1)).nan_to_num(nan=0.0)  # 0 / 0
    thresholds = torch.from_numpy(codebooks.DYNAMIC_THRESHOLDS).to(absmax.device)
    codes = torch.bucketize(scaled.view(-1)[:count], thresholds, out_int32=True)
    return codes.to(torch.uint8), nested_absmax


def _fake(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    count = absmax.numel()
    nested = absmax.new_empty((blocks(count, GROUP_SIZE),), dtype=torch.float32)
    return absmax.new_empty((count,), dtype=torch.uint8), nested


_kernel = cpu.kernel("quantize_absmax", "pqfppp")


def _cpu(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = cpu.require("quantize_absmax", "absmax", absmax, torch.float32, absmax.numel())
    codes, nested_absmax = _fake(absmax, offset)
    _kernel(absmax, absmax.numel(), offset, cpu.address(codebooks.DYNAMIC_THRESHOLDS), codes, nested_absmax)
    return codes, nested_absmax


_kernel_cuda = cuda.kernel("quantize_absmax", "pqfppp")


def _cuda(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    absmax = cuda.require("quantize_absmax", "absmax", absmax, torch.float32, absmax.numel(), absmax.device)
    codes, nested_absmax = _fake(absmax, offset)
    if absmax.numel():
        thresholds = cuda.table(codebooks.DYNAMIC_THRESHOLDS, absmax.device)
        _kernel_cuda((), (nested_absmax.numel(),), 256, 0, absmax, absmax.numel(), offset, thresholds, codes, nested_absmax)
    return codes, nested_absmax


_op = define("quantize_absmax(Tensor absmax, float offset) -> (Tensor, Tensor)", _reference, _fake, _cpu, _cuda)


def quantize_absmax(absmax: torch.Tensor, offset: float) -> tuple[torch.Tensor, torch.Tensor]:
    """absmax float32 [n] to codes uint8 [n] and nested_absmax float32 [ceil(n/256)]. `offset` is that of `mean_absmax`."""
    return _op(absmax, offset)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 255, 256, 1000):
        absmax = torch.rand(count, generator=generator)
        yield str(count), {"absmax": absmax, "offset": mean_absmax(absmax)}
    yield "equal", {"absmax": torch.full((300,), 0.25), "offset": 0.25}
    yield "tiny", {"absmax": torch.rand(300, generator=generator) * 1e-39, "offset": 0.0}
    yield "on-thresholds", {"absmax": torch.from_numpy(codebooks.DYNAMIC_THRESHOLDS).repeat(2), "offset": 0.0}
    wide = torch.logspace(-6, 2, 512)
    yield "wide", {"absmax": wide, "offset": mean_absmax(wide)}
