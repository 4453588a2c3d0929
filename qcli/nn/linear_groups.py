"""Linear layers whose weight has scales of groups, rows, blocks or the whole: integers of 4 to 8 bits, and small floats, in the
layout of any format that stores them.

A module is made with the tensors as they are stored, so that loaders fill it. `arrange` then lays them out once as the kernels read
them: codes of up to 4 bits two a byte, others one a byte, beside their scales. Columns that GPTQ has put in another order are
sorted by their groups, and so is every input.
"""

from typing import Self

import torch

from qcli import formats
from qcli.formats import Stored
from qcli.methods._groups import values_of
from qcli.methods.simulate import round_statically, rounding
from qcli.nn._fast_path import FastPath
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.ops.dequantize_4bit import decoded_absmax, dequantize_4bit
from qcli.ops.linear_4bit import Prepared4bit, linear_4bit
from qcli.ops.linear_w8a16 import PreparedW8A16, linear_w8a16, widened
from qcli.packing import pack_4bit, swap_pairs, to_unsigned

_KERNEL_GROUP = 16  # of which groups of 8-bit codes are multiples


class LinearGroups(FastPath, QuantizedLinear):
    """`weight` and the other stored tensors by attribute, until `arrange` has laid them out. From then on `weight` has the codes,
    `scale` [out_features * groups] or [out_features, groups] their scales, `zero_point` int8 the same count or None, `global_scale`
    float32 [1] what all scales are divided by or None, and `columns` int64 [in_features] the order of the columns or None.

    With `rounds_activations` inputs are rounded as the scheme says. With `rounds_few` false that does not hold for the few tokens
    of a decoding step on a CPU, where rounding saves nothing.
    """

    replaces_tensors = True

    def __init__(
        self, stored: Stored, tensors: dict[str, torch.Tensor], bias: bool, dtype: torch.dtype, compute_dtype: torch.dtype
    ):
        super().__init__(stored.in_features, stored.out_features, bias, tensors, dtype)
        self.stored, self.compute_dtype, self.arranged = stored, compute_dtype, False
        self.rounds_activations = self.rounds_few = stored.scheme.activations is not None

    @classmethod
    def serves(cls, stored: Stored) -> bool:
        return stored.format != "bitsandbytes" and not stored.scheme.runs_by_table(stored.in_features)

    @classmethod
    def of(
        cls, stored: Stored, tensors: dict[str, torch.Tensor], *, bias: bool, dtype: torch.dtype, compute_dtype: torch.dtype
    ) -> Self:
        return cls(stored, tensors, bias, dtype, compute_dtype)

    def extra_repr(self) -> str:
        scheme = self.stored.scheme
        shared = f"{scheme.share} of {scheme.size}" if scheme.size else scheme.share
        rounds = f", rounds_activations={self.rounds_activations}" if scheme.activations else ""
        zero = ", zero_point" if scheme.zero_point else ""
        return f"{super().extra_repr()}, {scheme.codebook or f'int{scheme.bits}'}, a scale for each {shared}{zero}{rounds}"

    def arrange(self) -> None:
        """Lays the stored tensors out for the kernels. Called once they are loaded; it does nothing a second time."""
        if self.arranged:
            return
        stored = self.stored_tensors()
        format = formats.get(self.stored.format)
        parts = format.scales(self.stored, stored)
        self.drop_stored()
        scheme, scale, zero_point, columns = self.stored.scheme, parts["scale"], parts.get("zero_point"), order_of_columns(parts)
        self._small = scheme.bits <= 4
        self.group_size = scheme.size if scheme.share in ("group", "block") else 0
        if scheme.share == "block":
            scale = scale.repeat_interleave(scheme.size, 0)[: self.out_features]
        elif scheme.share == "tensor":
            scale = scale.expand(self.out_features, 1)
        whole_groups = self.group_size == 0 or self.in_features % self.group_size == 0
        if self._small and whole_groups and (self.group_size or self.in_features) % 2 == 0:
            pairs = format.pairs(self.stored, stored) if columns is None else None
            if pairs is None:
                codes = format.codes(self.stored, stored)
                codes = codes if columns is None else codes[:, columns]
                codes = pack_4bit((codes if scheme.codebook else to_unsigned(codes, 4)).reshape(-1), 0)
            else:
                codes = swap_pairs(pairs).view(-1, 1)
            scale = scale.reshape(-1)
            zero_point = None if zero_point is None else zero_point.reshape(-1)
            if scheme.scale == "e8m0":
                scale = scale.view(torch.float8_e8m0fnu)
        else:
            self._small = False
            codes = format.codes(self.stored, stored)
            codes = codes if columns is None else codes[:, columns].contiguous()
            scale = values_of_scale(scale, scheme.scale)
            if scheme.codebook == "e2m1" or (self.group_size or _KERNEL_GROUP) % _KERNEL_GROUP:  # no kernel has this form
                global_scale = parts.get("global_scale")
                wide = values_of(scheme, codes, parts["scale"], zero_point, global_scale).float()
                codes, scale = wide.to(self.compute_dtype), torch.ones(0)
            if zero_point is not None and not self.group_size:  # the kernel's zero points are of groups
                codes, scale, zero_point = (codes.float() - zero_point).mul_(scale).to(self.compute_dtype), torch.ones(0), None
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero_point", None if zero_point is None else zero_point.contiguous())
        self.register_buffer("global_scale", parts["global_scale"].float() if "global_scale" in parts else None)
        self.register_buffer("columns", columns)
        self.arranged = True

    def drop_stored(self) -> None:
        """Lets go of the stored tensors beside the codes, but for those of activations."""
        for name in self.stored_tensors():
            if name != "weight" and not name.startswith("input_"):
                delattr(self, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        self.arrange()
        few = x.is_cpu and x.numel() <= self._prepare.MOST_TOKENS * self.in_features
        if self.rounds_activations and (self.rounds_few or not few):
            rounded = self._rounded(x.detach())
            x = _Straight.apply(x, rounded) if x.requires_grad else rounded
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        if self._dense:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.linear(x, self.weight.to(x.dtype), bias)
        return super().forward(x)

    def for_few_tokens(self):
        """The CPU kernel's view of the weight. Raises ValueError where a call is more than its product."""
        self.arrange()
        if self.columns is not None or (self.rounds_activations and self.rounds_few) or self._dense:
            raise ValueError("the module does more than multiply")
        return self.kernel_view()

    @property
    def _dense(self) -> bool:
        return not self.scale.numel()

    @property
    def _op(self):
        return linear_4bit if self._small else linear_w8a16

    @property
    def _prepare(self):
        return Prepared4bit if self._small else PreparedW8A16

    def _arguments(self) -> tuple:
        if not self._small:
            return self.weight, self.scale, self.bias, self.group_size, self.zero_point
        size = self.group_size or self.in_features
        codebook = self.stored.scheme.codebook or "int4"
        shape = self.out_features, self.compute_dtype
        return self.weight, self.scale, self.global_scale, 0.0, self.bias, size, codebook, *shape, self.zero_point

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`."""
        self.arrange()
        if self._dense:
            found = self.weight.to(dtype)
        elif self._small:
            codebook, shape = self.stored.scheme.codebook or "int4", [self.out_features, self.in_features]
            absmax = decoded_absmax(self.scale, self.global_scale, 0.0, codebook)
            size = self.group_size or self.in_features
            found = dequantize_4bit(self.weight, absmax, size, codebook, shape, dtype, self.zero_point)
        else:
            found = widened(self.weight, self.scale, self.group_size or self.in_features, self.zero_point, dtype)
        return found if self.columns is None else torch.empty_like(found).index_copy_(1, self.columns, found)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight."""
        self.arrange()
        if self._dense:
            return self.weight[ids].to(dtype)
        size = self.group_size or self.in_features
        scale, zero_point = (None if t is None else t.view(self.out_features, -1)[ids] for t in (self.scale, self.zero_point))
        if not self._small:
            return widened(self.weight[ids], scale, size, zero_point, dtype)
        codebook, codes = self.stored.scheme.codebook or "int4", self.weight.view(self.out_features, -1)[ids].view(-1, 1)
        absmax = decoded_absmax(scale.reshape(-1), self.global_scale, 0.0, codebook)
        zeros = None if zero_point is None else zero_point.reshape(-1)
        return dequantize_4bit(codes, absmax, size, codebook, [len(ids), self.in_features], dtype, zeros)

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        scheme, wide = self.stored.scheme, x.float()
        if (scale := getattr(self, "input_scale", None)) is not None:
            return round_statically(wide, scale.float(), scheme.activation_codebook).to(x.dtype)
        if (scale := getattr(self, "input_global_scale", None)) is not None:
            return rounding(scheme, scale.float())(wide).to(x.dtype)
        return rounding(scheme)(wide).to(x.dtype)


class _Straight(torch.autograd.Function):
    """`rounded` in the place of `x`. Gradients pass straight through: those of rounding itself are zero almost everywhere."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx, of_result: torch.Tensor) -> tuple[torch.Tensor, None]:
        return of_result, None


def order_of_columns(parts: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """The columns sorted by their groups, int64 [in_features]; None where they lie so."""
    found = parts.get("group_of_column")
    return None if found is None else found.long().argsort(stable=True)


def values_of_scale(scale: torch.Tensor, kind: str) -> torch.Tensor:
    """Scales in float32. `kind` is as in Scheme.scale."""
    return torch.exp2(scale.float() - 127) if kind == "e8m0" else scale.float()


MODULE = LinearGroups
