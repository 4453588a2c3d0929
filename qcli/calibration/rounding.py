"""What a weight becomes by what texts say of its inputs: codes and scales, or columns that stay in 16 bits."""

from dataclasses import dataclass
from typing import Any, cast

import torch

from qcli.calibration.statistics import Statistics
from qcli.checkpoint import dtypes
from qcli.methods._calibrated import Calibratable
from qcli.methods._gptq import Found, gptq, nearest, refitted
from qcli.methods._method import Method, Parts
from qcli.methods.choosing import needs_of
from qcli.methods.simulate import Simulated, simulated, with_fixed_columns


@dataclass
class Changed:
    """By what a weight [out_features, in_features] is multiplied before it is rounded: its columns by `columns` [in_features], its
    rows by `rows` [out_features], both float32; None by nothing."""

    columns: torch.Tensor | None = None
    rows: torch.Tensor | None = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The product, float32."""
        wide = weight.float()
        wide = wide if self.columns is None else wide * self.columns
        return wide if self.rows is None else wide * self.rows.unsqueeze(1)


NOTHING = Changed()


def needs_factor(method: Any, statistics: Statistics) -> bool:
    """Whether a method rounds a weight by the factor of the Hessian in these statistics."""
    return statistics.hessian is not None and getattr(method, "rounding", "") == "gptq"


def rounded(weight: torch.Tensor, method: Any, statistics: Statistics | None, absmax: float, changed: Changed = NOTHING) -> Found:
    """The codes of weight [out_features, in_features], changed as `changed` says. The statistics are of the inputs that it then
    has. Without any it is rounded to nearest."""
    wide, calibrated = changed.of(weight), cast(Calibratable, method)
    if statistics is None:
        return nearest(wide, calibrated.grid(wide.to(weight.dtype), None, absmax))
    hessian = statistics.hessian
    factor = statistics.factor(calibrated.damping) if needs_factor(method, statistics) else None
    grid = calibrated.grid(wide.to(weight.dtype), factor.importance if factor else statistics.mean_square, absmax)
    if hessian is None or factor is None:
        return nearest(wide, grid)
    return refitted(wide, hessian, gptq(wide, hessian, grid, factor))


def with_columns(weight: torch.Tensor, method: Method, statistics: Statistics | None) -> Parts:
    """The parts of weight [out_features, in_features] with columns that stay in 16 bits. Without statistics they are those of the
    largest norm."""
    rows, columns = weight.shape
    encoder = method.encoder(rows, columns, weight.device)
    parts = encoder.feed(weight, 0)
    parts |= encoder.finish()[0]
    if count := method.scheme.outlier_columns(columns):
        chosen = statistics.chosen(count) if statistics else weight.float().square().sum(0).topk(count).indices.sort().values.int()
        stored = method.scheme.parts(rows, columns, dtypes.CODES[str(weight.dtype).removeprefix("torch.")])["outlier_weight"].dtype
        parts["outlier_columns"] = chosen
        parts["outlier_weight"] = weight[:, chosen.long()].to(dtypes.torch_dtype(stored))
    return parts


def simulated_by(weight: torch.Tensor, method: Method, statistics: Statistics | None, absmax: float) -> Simulated:
    """What a layer with weight [out_features, in_features] computes once it is rounded by these statistics."""
    if needs_of(method) != "tokens":
        return simulated(method.scheme, rounded(weight, method, statistics, absmax).values)
    parts = with_columns(weight, method, statistics)
    values = method.decode(parts, *weight.shape)
    if "outlier_columns" not in parts:
        return simulated(method.scheme, values)
    return with_fixed_columns(values, parts["outlier_columns"], method.scheme.threshold)
