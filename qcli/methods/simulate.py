"""What a linear layer computes under a method, on any device, in float32. It follows from the method alone: the weight is encoded
and decoded, and the activations are rounded as the method's scheme says.

y = X^ W^T + bias, where X^ and W^ are the values that the method's integers or codes stand for. The activations of one sequence
are taken together and those of two never are. So neither a scale of "the tensor" nor the outlier columns of LLM.int8() depend on
how sequences are batched. Sequences of one length are rounded in the same few operations and multiplied in one product.
"""

from collections.abc import Callable

import torch

from qcli.methods import zeropoint
from qcli.methods._method import Method
from qcli.ops.dequantize_int8 import dequantize_int8
from qcli.ops.quantize_int8 import quantize_int8
from qcli.schemes import Scheme

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
    one.
    """

    keeps_columns = True

    def __init__(self, weight: torch.Tensor, original: torch.Tensor | None, threshold: float):
        super().__init__(weight)
        self._original, self._threshold = original, threshold

    def activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not x.numel():
            return super().activations(x)
        sequences = x.reshape(-1, *x.shape[-2:]).float()
        found = [quantize_int8(sequence, self._threshold) for sequence in sequences]
        q, absmax, kept = (torch.cat(parts) for parts in zip(*found))
        rounded, kept = dequantize_int8(q, absmax, torch.float32).view(sequences.shape), kept.view(len(sequences), -1)
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


def simulate(method: Method, weight: torch.Tensor) -> Simulated:
    """A weight [out_features, in_features], given in the dtype that it is stored in, under `method`."""
    scheme = method.scheme
    if not scheme.bits:
        return Simulated(weight.float())
    out_features, in_features = weight.shape
    encoder = method.encoder(out_features, in_features, weight.device)
    parts = encoder.feed(weight.contiguous(), 0)
    parts |= encoder.finish()[0]
    values = method.decode(parts, out_features, in_features)
    if scheme.threshold:
        return _Decomposed(values, weight if scheme.keeps_original else None, scheme.threshold)
    if scheme.activations is None:
        return _In16Bits(values)
    return Simulated(values, rounding(scheme))


def rounding(scheme: Scheme) -> Rounding:
    """What makes X^ of activations float32 [..., tokens, in_features] in int8: a scale for each token, or for each sequence."""
    rows = zeropoint.round_rows if scheme.zero_point else round_rows
    if scheme.activations == "token":
        return rows
    return lambda x: rows(x.flatten(-2)).view(x.shape)


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
