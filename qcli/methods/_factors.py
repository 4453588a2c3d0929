"""Factors that move the range of activations into weights: x W^T = (x / s) (W diag(s))^T, with one s for each channel.

The division is folded into what makes x, so that a reader of the checkpoint sees nothing of it. All modules that read x share s. A
method proposes factors and measures what each leaves of the outputs' error; 1 is always among them, so that its own measure never
says that it became worse.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from qcli.methods._calibrated import Calibratable
from qcli.schemes import Scheme

SMALLEST = 1e-5  # SmoothQuant's own bound of a factor
ROWS = 128  # of a weight, evenly spaced, whose outputs' error is measured: rows are rounded one by one, so a part speaks for all


@dataclass(frozen=True)
class Inputs:
    """What texts say of x [tokens, in_features].

    magnitude, absmax, mean_square: mean |x_j|, max |x_j| and E[x_j^2], float32 [in_features]. sample: some of the tokens, float32
    [tokens, in_features]. hessian: sum x x^T float32 [in_features, in_features], or None.
    """

    magnitude: torch.Tensor
    absmax: torch.Tensor
    mean_square: torch.Tensor
    sample: torch.Tensor
    hessian: torch.Tensor | None


@dataclass(frozen=True)
class Factors:
    """`scale` float32 [in_features], None where 1 is best. `error` is what the method measured with it, and `plain_error` with 1.
    `exponent` is that of the best formula, 0 for 1."""

    scale: torch.Tensor | None
    exponent: float
    error: float
    plain_error: float


def smooth_scale(absmax: torch.Tensor, weight_absmax: torch.Tensor, exponent: float) -> torch.Tensor:
    """SmoothQuant's s_j = max|X_j|^a / max|W_j|^(1 - a) (arXiv:2211.10438, equation 4), in the dtype of absmax [in_features]. A
    channel without activations or without weights has 1."""
    scale = absmax.clamp(min=SMALLEST).pow(exponent) / weight_absmax.clamp(min=SMALLEST).pow(1 - exponent)
    return torch.where((absmax > 0) & (weight_absmax > 0), scale.clamp(min=SMALLEST), 1.0)


def awq_scale(magnitude: torch.Tensor, weight_mean: torch.Tensor | None, exponent: float) -> torch.Tensor:
    """AWQ's s (arXiv:2306.00978, section 3.2) as AutoAWQ 0.2 computes it, in the dtype of `magnitude` [in_features]: a power of
    mean |x_j|, over one of `weight_mean` where that is given, normalized so that the greatest and the least are inverse."""
    if weight_mean is None:
        scale = magnitude.pow(exponent).clamp(min=1e-4)
    else:
        scale = (magnitude.pow(exponent) / (weight_mean.pow(1 - exponent) + 1e-4)).clamp(min=1e-4)
    scale = scale / (scale.max() * scale.min()).sqrt()
    return torch.where(scale.isfinite(), scale, 1.0)


def awq_weight_mean(weights: Sequence[torch.Tensor], group_size: int) -> torch.Tensor:
    """The mean over all rows of |w_j| / (max |w| of its group), in the dtype of the weights [out_features, in_features]."""
    total, rows = torch.zeros_like(weights[0][0]), 0
    for weight in weights:
        groups = weight.abs().view(-1, group_size)
        total += (groups / (groups.amax(1, keepdim=True) + 1e-6)).view(weight.shape).sum(0)
        rows += len(weight)
    return total / rows


def measured_rows(weight: torch.Tensor) -> torch.Tensor:
    """The rows of a weight [out_features, in_features] whose outputs' error is measured."""
    if len(weight) <= ROWS:
        return weight
    return weight[torch.arange(ROWS, device=weight.device) * len(weight) // ROWS]


def best_factors(candidates: Iterable[tuple[float, torch.Tensor]], error: Callable[[torch.Tensor | None], float]) -> Factors:
    """Of (exponent, s) the one with the least `error`, which takes s, or None for 1."""
    plain = error(None)
    best = Factors(None, 0.0, plain, plain)
    for exponent, scale in candidates:
        found = error(scale)
        if found < best.error:
            best = Factors(scale, exponent, found, plain)
    return best


def awq_factors(method: Calibratable, inputs: Inputs, weights: Sequence[torch.Tensor], steps: int) -> Factors:
    """The factors of AWQ's form for which the outputs of modules with these weights [out_features, in_features], rounded by
    `method`, are nearest to what they were: over all tokens, by H."""
    from qcli.methods._gptq import nearest, output_error

    hessian = inputs.hessian
    assert hessian is not None
    measured = [measured_rows(weight) for weight in weights]

    def error(scale: torch.Tensor | None) -> float:
        total = 0.0
        for weight in measured:
            wide = weight.float()
            changed = wide if scale is None else wide * scale
            importance = inputs.mean_square if scale is None else inputs.mean_square / scale.square()
            values = nearest(changed, method.grid(changed.to(weight.dtype), importance, float(changed.abs().max()))).values
            total += output_error(wide, values if scale is None else values / scale, hessian)
        return total

    return best_factors(awq_candidates(method.scheme, inputs, weights, steps), error)


def awq_candidates(scheme: Scheme, inputs: Inputs, weights: Sequence[torch.Tensor], steps: int) -> list[tuple[float, torch.Tensor]]:
    """(r, s) of AWQ's two forms for `steps` exponents r from 0 up to 1."""
    magnitude, columns = inputs.magnitude.double(), weights[0].shape[1]
    size = scheme.size if scheme.size and columns % scheme.size == 0 else columns
    weight_mean = awq_weight_mean([weight.double() for weight in weights], size)
    exponents = [step / steps for step in range(steps)]
    candidates = [(r, awq_scale(magnitude, None, r).float()) for r in exponents[1:]]  # 0 is the identity
    return [*candidates, *((r, awq_scale(magnitude, weight_mean, r).float()) for r in exponents)]
