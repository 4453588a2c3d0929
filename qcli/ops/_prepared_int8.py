"""An int8 weight for few tokens on a CPU: checked once, and called without the way through the op."""

import torch

from qcli.runtime import cpu

LONGEST = 1 << 17  # columns: from this number on, a sum of int8 products may overflow int32
_few = cpu.kernel("linear_int8", "piqpp")


class PreparedInt8:
    """A weight, checked and prepared for the CPU kernels. Its arguments after in_features are those of the op after x. It raises
    the same errors as the op."""

    MOST_TOKENS = 16  # up to this number the weight is read once, and torch's product is slower
    STEP = "linear_int8_step"

    def __init__(self, in_features: int, weight, scale, bias, threshold: float, fixed=None, original=None):
        op, self.in_features, self.out_features = "linear_int8", in_features, weight.shape[0]
        if in_features >= LONGEST:
            raise ValueError(f"{op}: x has {in_features} columns, expected fewer than {LONGEST}: int32 sums would overflow")
        weight = cpu.require(op, "weight", weight, torch.int8, self.out_features * in_features)
        scale = cpu.require(op, "scale", scale.float(), torch.float32, self.out_features)
        if bias is not None:
            bias = cpu.require(op, "bias", bias, bias.dtype, self.out_features)
        count = 0 if fixed is None else fixed.numel()
        if fixed is not None:
            fixed = cpu.require(op, "fixed", fixed, torch.int32, count)
            original = cpu.require(op, "original", original, original.dtype, self.out_features * count)
        self.weight = cpu.Record(
            "pppqqqfqppq",
            weight,
            scale,
            bias,
            0 if bias is None else cpu.dtype_code(op, bias, "bias"),
            self.out_features,
            self.in_features,
            threshold,
            count,
            fixed,
            original,
            0 if original is None else cpu.dtype_code(op, original, "original"),
        )
        self.address, self.addresses = self.weight.address, self.weight.addresses

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        y = x.new_empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        _few(x.contiguous(), cpu.dtype_code("linear_int8", x), tokens, self.address, y)
        return y
