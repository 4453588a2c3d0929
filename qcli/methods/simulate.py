"""What a linear layer computes under a method, on any device, in float32. It follows from the method alone: the weight is encoded
and decoded, and the activations are rounded as the method's scheme says.

y = X^ W^T + bias, where X^ and W^ are the values that the method's integers or codes stand for. The activations of one sequence
are taken together and those of two never are. So neither a scale of "the tensor" nor the outlier columns of LLM.int8() depend on
how sequences are batched. Sequences of one length are rounded in the same few operations and multiplied in one product.
"""

from collections.abc import Callable
from functools import partial

import torch

from qcli.methods import zeropoint
from qcli.methods._fp4 import mx_rounds, nv_rounds
from qcli.methods._groups import values_of
from qcli.methods._method import Method
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.ops.round_floats import E4M3_MAX, to_e4m3
from qcli.schemes import NAMED, Scheme

_ROWS = 1024  # rows of a weight in float32 at a time

Rounding = Callable[[torch.Tensor], torch.Tensor]


class Simulated:
    """A weight [out_features, in_features] under a method: `weight` is W^, float32. `rounding` makes X^ of activations, float32
    [..., tokens, in_features], each sequence by itself; None leaves them whole."""

    keeps_columns = False  # whether some columns of activations stay in 16 bits

    def __init__(self, weight: torch.Tensor, rounding: Rounding | None = None):
        self.weight, self._rounding = weight, rounding

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """X^ of x [..., tokens, in_features], in float32, and the columns that each sequence keeps in 16 bits, bool
        [..., in_features]. They do not depend on the weight."""
        x = x.float()
        kept = torch.zeros(*x.shape[:-2], x.shape[-1], dtype=torch.bool, device=x.device)
        return (self._rounding(x) if self._rounding and x.numel() else x), kept

    def weight_for(self, kept: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """W^ float32 as activations of `dtype` meet it, where the columns `kept`, bool [in_features], stay in 16 bits."""
        return self.weight

    def product(
        self, rounded: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """X^ W^T + bias, [..., tokens, out_features] in `dtype`, of what `activations` gave for x of that dtype. bias
        [out_features] or None."""
        y = self._product(rounded, kept, dtype)
        if bias is not None:
            y += bias.float()
        return y.to(dtype)

    def _product(self, rounded: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """X^ W^T, float32."""
        return _times_transposed(rounded, self.weight_for(kept, dtype))

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., tokens, in_features], float32 or 16 bits, to [..., tokens, out_features] in x's dtype, one sequence after
        another along the leading dimensions. x [in_features] is a sequence of one token. bias [out_features] or None."""
        sequences = x if x.dim() > 1 else x.unsqueeze(0)
        y = self.product(*self.activations(sequences), x.dtype, bias)
        return y if x.dim() > 1 else y.squeeze(0)


class _In16Bits(Simulated):
    """Activations are whole. The product takes the weight in their dtype, as the kernels do."""

    def weight_for(self, kept: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.weight.to(dtype).float()


class _Decomposed(Simulated):
    """LLM.int8() (arXiv:2208.07339, section 3.2, equation 8): int8, but for the outlier columns of X.

    A column of X is an outlier where any token of the sequence has |x| >= threshold in it. It multiplies unrounded, and the
    tokens' scales leave its large values out. `original` is the 16-bit weight, or None where outlier columns come from the int8
    one. `fixed` int64 [n] are columns that always multiply unrounded, and that `weight` has in 16 bits.
    """

    keeps_columns = True

    def __init__(self, weight: torch.Tensor, original: torch.Tensor | None, threshold: float, fixed: torch.Tensor | None = None):
        super().__init__(weight)
        self._original, self._threshold, self._fixed = original, threshold, fixed

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not x.numel():
            return super().activations(x)
        sequences = x.reshape(-1, *x.shape[-2:]).float()
        entering = sequences if self._fixed is None else sequences.index_fill(2, self._fixed, 0.0)
        found = [quantize_int8(sequence, self._threshold) for sequence in entering]
        q, absmax, kept = (torch.cat(parts) for parts in zip(*found))
        rounded, kept = dequantize_int8(q, absmax, torch.float32).view(sequences.shape), kept.view(len(sequences), -1)
        if self._fixed is not None:
            kept[:, self._fixed] = True
        for rows, columns in _alike(kept):
            rounded[rows, :, columns] = sequences[rows, :, columns]
        return rounded.view(x.shape), kept.view(*x.shape[:-2], -1)

    def weight_for(self, kept: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        columns = kept.nonzero().view(-1)
        if not columns.numel() or (self._original is None and dtype == torch.float32):
            return self.weight
        return self.weight.index_copy(1, columns, self._kept(columns, dtype))

    def _kept(self, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        source = self.weight if self._original is None else self._original
        return source[:, columns].to(dtype).float()

    def _product(self, rounded: torch.Tensor, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # In two parts, since a copy of the whole weight for each sequence takes longer than the product.
        if not rounded.numel():
            return super()._product(rounded, kept, dtype)
        y = _times_transposed(rounded * (~kept).float().unsqueeze(-2), self.weight)
        x, outputs = (t.reshape(-1, *t.shape[-2:]) for t in (rounded, y))
        for rows, columns in _alike(kept.reshape(-1, kept.shape[-1])):
            outputs[rows] += _times_transposed(x[rows][..., columns], self._kept(columns, dtype))
        return y


def with_fixed_columns(weight: torch.Tensor, columns: torch.Tensor, threshold: float) -> Simulated:
    """LLM.int8() with `columns` int32 [n] that are always kept in 16 bits. `weight` is what its codes and they stand for."""
    return _Decomposed(weight, None, threshold, columns.long())


def simulate(method: Method, weight: torch.Tensor) -> Simulated:
    """A weight [out_features, in_features], given in the dtype that it is stored in, under `method`."""
    scheme = method.scheme
    if not scheme.bits:
        return Simulated(weight.float())
    out_features, in_features = weight.shape
    absmax = absmax_of(weight) if method.needs_absmax else 0.0
    encoder = method.encoder(out_features, in_features, weight.device, absmax)
    parts = encoder.feed(weight.contiguous(), 0)
    parts |= encoder.finish()[0]
    return simulated(scheme, method.decode(parts, out_features, in_features), weight if scheme.keeps_original else None)


def simulated(scheme: Scheme, values: torch.Tensor, original: torch.Tensor | None = None) -> Simulated:
    """A weight that `scheme` stores, which stands for `values` float32 [out_features, in_features]. `original` is the unquantized
    one, where the scheme keeps it."""
    if scheme.threshold:
        return _Decomposed(values, original, scheme.threshold)
    if scheme.activations is None:
        return _In16Bits(values)
    return Simulated(values, rounding(scheme))


def absmax_of(weight: torch.Tensor) -> float:
    """The largest finite magnitude of a weight, on which a scale of the whole weight is made."""
    return max(
        (float(chunk.float().nan_to_num(0.0, 0.0, 0.0).abs().max()) for chunk in weight.split(_ROWS) if chunk.numel()), default=0.0
    )


def rounding(scheme: Scheme, global_scale: torch.Tensor | None = None) -> Rounding:
    """What makes X^ of activations float32 [..., tokens, in_features]: a scale for each token, each group of one, or each sequence.
    `global_scale` float32 [1] is that of NVFP4's activations, 1 without it."""
    if scheme.activation_codebook == "e2m1":
        return _round_mxfp4 if scheme.scale == "e8m0" else partial(_round_nvfp4, global_scale=global_scale)
    if scheme.activation_codebook == "e4m3":
        return partial(_round_e4m3, size=scheme.size) if scheme.activations == "group" else _round_e4m3
    rows = zeropoint.round_rows if scheme.zero_point else round_rows
    if scheme.activations == "token":
        return rows
    return lambda x: rows(x.flatten(-2)).view(x.shape)


def _round_e4m3(x: torch.Tensor, size: int = 0) -> torch.Tensor:
    """x float32 [..., columns] in E4M3, with a scale for each row, or for each `size` columns of one."""
    whole = -x.shape[-1] % size if size else 0
    groups = torch.nn.functional.pad(x, (0, whole)).unflatten(-1, (-1, size or x.shape[-1]))
    scale = groups.abs().amax(-1, keepdim=True) / E4M3_MAX
    codes = to_e4m3(groups / torch.where(scale == 0, 1.0, scale))
    values: torch.Tensor = (codes.float() * scale).flatten(-2)
    return values[..., : x.shape[-1]]


def _round_nvfp4(x: torch.Tensor, global_scale: torch.Tensor | None) -> torch.Tensor:
    """x float32 [..., columns] in NVFP4."""
    whole = torch.ones(1, device=x.device) if global_scale is None else global_scale
    return _round_e2m1(x, NAMED["nvfp4"], partial(nv_rounds, global_scale=whole), whole)


def _round_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """x float32 [..., columns] in MXFP4."""
    return _round_e2m1(x, NAMED["mxfp4"], mx_rounds, None)


def _round_e2m1(
    x: torch.Tensor, scheme: Scheme, rounds: Callable[..., tuple[torch.Tensor, torch.Tensor]], global_scale: torch.Tensor | None
) -> torch.Tensor:
    rows = torch.nn.functional.pad(x.reshape(-1, x.shape[-1]), (0, -x.shape[-1] % scheme.size))
    codes, scale = rounds(rows, scheme.size)
    values = values_of(scheme, codes, scale, None, global_scale)
    found: torch.Tensor = values[:, : x.shape[-1]].reshape(x.shape)
    return found


def round_statically(x: torch.Tensor, scale: torch.Tensor, codebook: str | None) -> torch.Tensor:
    """x float32 in int8, or in E4M3, with the one scale of a checkpoint."""
    if codebook == "e4m3":
        return to_e4m3(x / scale).float() * scale
    return (x / scale).round_().clamp_(-128, 127) * scale


def round_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., columns] in absmax int8 with a scale for each row, as float32."""
    q, absmax, _ = quantize_int8(x.reshape(-1, x.shape[-1]), 0.0)
    return dequantize_int8(q, absmax, torch.float32).view(x.shape)


def _times_transposed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., tokens, in_features] by weight [out_features, in_features]: every row in one product."""
    return (x.reshape(-1, x.shape[-1]) @ weight.t()).view(*x.shape[:-1], len(weight))


def _alike(kept: torch.Tensor) -> list[tuple[slice, torch.Tensor]]:
    """Runs of sequences of kept [sequences, columns] that keep the same columns, with those columns; without such as keep none."""
    masks = [mask.tobytes() for mask in kept.cpu().numpy()]
    starts = [row for row, mask in enumerate(masks) if not row or mask != masks[row - 1]]
    found = [(slice(a, b), kept[a].nonzero().view(-1)) for a, b in zip(starts, [*starts[1:], len(masks)])]
    return [(rows, columns) for rows, columns in found if columns.numel()]
