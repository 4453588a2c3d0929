"""Row-wise int8 quantization (LLM.int8(), arXiv:2208.07339, section 2.1): q = round(x * (127 / absmax)), half to even.

All in float32 from the stored dtype, so bfloat16 and float32 values beyond float16's range stay finite. With a threshold,
elements of |x| >= threshold are outliers: a row's absmax excludes them and their whole columns are zero in q. A row of
zeros has absmax 0 and q 0. A row with NaN or infinity has q 0 and that absmax.
"""

import torch

from qcli.ops._library import define


def _reference(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = x.shape[-1]
    rows = x.reshape(-1, columns).float()
    outliers = torch.zeros(columns, dtype=torch.bool, device=x.device)
    kept = rows
    if threshold > 0 and rows.numel():
        is_outlier = rows.abs() >= threshold
        outliers = is_outlier.any(0)
        kept = rows.masked_fill(is_outlier, 0.0)
    absmax = kept.abs().amax(1) if columns else rows.new_zeros(rows.shape[0])
    kept = kept.masked_fill(outliers, 0.0)
    scale = (127.0 / absmax).unsqueeze(1)
    # Where 127 / absmax leaves float32's range: zeros (whose product would be NaN), and rows below 3.7e-37.
    scaled = torch.where(torch.isfinite(scale), kept * scale, (kept / absmax.unsqueeze(1)).nan_to_num(nan=0.0) * 127.0)
    q = scaled.round_().clamp_(-127, 127).nan_to_num_(nan=0.0)
    q.masked_fill_(~torch.isfinite(absmax).unsqueeze(1), 0.0)
    return q.to(torch.int8).view(x.shape), absmax, outliers


def _fake(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = x.shape[-1]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    absmax = x.new_empty((rows,), dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), absmax, x.new_empty((columns,), dtype=torch.bool)


_op = define("quantize_int8(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)", _reference, _fake)


def quantize_int8(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., columns], float32, bfloat16 or float16; threshold 0.0 turns outliers off.

    Returns q int8 of x's shape, absmax float32 [rows], and outliers bool [columns].
    """
    return _op(x, threshold)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for threshold in (0.0, 6.0):
            for shape in ((1, 64), (5, 33), (2, 3, 128), (0, 16)):
                x = torch.randn(shape, generator=generator)
                if x.numel():
                    x[..., 3] *= 20
                name = f"{str(dtype)[6:]}-{threshold}-{'x'.join(map(str, shape))}"
                yield name, {"x": x.to(dtype), "threshold": threshold}
    hostile = torch.randn(6, 32, generator=generator)
    hostile[0] = 0
    hostile[1] = 1e-39
    hostile[2, 0] = 1e38
    hostile[3] = 7.0
    yield "hostile", {"x": hostile, "threshold": 6.0}
