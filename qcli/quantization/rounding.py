"""Rounds one weight by what texts say of its inputs, and writes it."""

from dataclasses import dataclass
from typing import Any, cast

import torch

from qcli.calibration.fisher import Fisher
from qcli.calibration.statistics import Statistics
from qcli.checkpoint import dtypes
from qcli.errors import NonFiniteError
from qcli.methods._calibrated import Calibratable
from qcli.methods._factors import measured_rows
from qcli.methods._gptq import Found, gptq, nearest, output_error, refitted
from qcli.methods._method import Method, Parts
from qcli.methods.choosing import needs_of
from qcli.methods.errors import ErrorSums
from qcli.methods.simulate import rounding as activation_rounding
from qcli.methods.simulate import simulate, with_fixed_columns
from qcli.quantization.decoding import block_scales, read_tensor
from qcli.quantization.outputs import weight_of
from qcli.quantization.plan import Plan, Work
from qcli.quantization.staging import Staging
from qcli.schemes import CHUNK_BYTES, Scheme


@dataclass
class Rounding:
    """What rounding a weight cost. `output_error` is tr(E H E^T) per token over the outputs that are measured, 128 at most,
    `plain_error` that of the same method without texts, `output_norm` tr(W H W^T) per token; all None without a Hessian. Where a
    scheme rounds activations, these are sums over a sample of tokens, and hold what that costs. `damping` is the one that was
    used."""

    errors: ErrorSums
    tokens: int = 0
    output_error: float | None = None
    plain_error: float | None = None
    output_norm: float | None = None
    damping: float | None = None
    dead: int = 0


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


def read_weight(plan: Plan, work: Work) -> torch.Tensor:
    """The weight of a work [out_features, in_features] in the dtype in which it is quantized. Raises CheckpointError, HubError, and
    NonFiniteError for a weight with NaN or infinity."""
    assert work.linear is not None and work.method is not None
    stored = read_tensor(plan.source, work.info)
    if work.linear.transposed:
        stored = stored.t().contiguous()
    if (scales := block_scales(plan.source, work.info)) is not None:
        stored = scales.rows(stored, 0)
    weight = stored.to(dtypes.torch_dtype(weight_of(work.info, work.linear, work.method, plan.dtype).dtype))
    lost = int((~weight.isfinite()).sum())
    if lost:
        raise NonFiniteError(
            f"{work.info.name} holds {lost:,} NaN or infinite values among {work.info.numel:,} (stored {work.info.dtype})",
            "Mend the model, or leave the module as it is with --skip.",
        )
    return weight


def round_weight(
    plan: Plan,
    staging: Staging,
    work: Work,
    statistics: Statistics | None,
    device: torch.device,
    absmax: float,
    changed: Changed | None = None,
) -> Rounding:
    """Rounds the weight of `work`, changed as `changed` says, by its method and writes it. The statistics are of the inputs that
    it then has. Without any it is what the method makes of the weight alone."""
    assert work.linear is not None and work.method is not None
    weight = read_weight(plan, work).to(device)
    if needs_of(work.method) == "tokens":
        parts, rounding = _with_columns(weight, work.method, statistics)
    else:
        found, rounding = _found(weight, cast(Any, work.method), statistics, absmax, changed or Changed())
        parts = found.grid.all_parts(found.codes)
    _write(plan, staging, work, parts)
    staging.finish_work(work.index, rounding.errors)
    return rounding


def round_by_fisher(plan: Plan, staging: Staging, work: Work, fisher: Fisher | None, device: torch.device) -> Rounding:
    """Rounds the weight of `work` by its Fisher information and writes it. Without any it is what the method makes of the weight
    alone."""
    assert work.method is not None
    weight, method = read_weight(plan, work).to(device), cast(Any, work.method)
    encoder = method.encoder_by(fisher.square) if fisher else method.encoder(*weight.shape, device)
    flat, step = weight.flatten(), max(CHUNK_BYTES // weight.shape[1], 1) * weight.shape[1]
    codes = [encoder.feed(flat[start : start + step], start)["codes"] for start in range(0, len(flat), step)]
    parts, errors = encoder.finish()
    _write(plan, staging, work, parts | {"codes": torch.cat(codes)})
    staging.finish_work(work.index, errors)
    return Rounding(errors, fisher.tokens if fisher else 0)


def _with_columns(weight: torch.Tensor, method: Method, statistics: Statistics | None) -> tuple[Parts, Rounding]:
    """The parts of a weight with columns that stay in 16 bits. Without statistics they are those of the largest norm."""
    rows, columns = weight.shape
    encoder = method.encoder(rows, columns, weight.device)
    parts = encoder.feed(weight, 0)
    parts |= encoder.finish()[0]
    if count := method.scheme.outlier_columns(columns):
        chosen = statistics.chosen(count) if statistics else weight.float().square().sum(0).topk(count).indices.sort().values.int()
        stored = method.scheme.parts(rows, columns, dtypes.CODES[str(weight.dtype).removeprefix("torch.")])["outlier_weight"].dtype
        parts["outlier_columns"] = chosen
        parts["outlier_weight"] = weight[:, chosen.long()].to(dtypes.torch_dtype(stored))
    values = method.decode(parts, rows, columns)
    rounding = Rounding(_sums(weight.float(), values), statistics.tokens if statistics else 0)
    if statistics and "outlier_columns" in parts:
        some, x = measured_rows(weight), statistics.sample
        ours = with_fixed_columns(measured_rows(values), parts["outlier_columns"], method.scheme.threshold)
        plain = simulate(cast(Any, method).without_texts(), some)
        wanted = x @ some.float().t()
        _measure(rounding, wanted, {"output_error": ours.linear(x), "plain_error": plain.linear(x)})
    return parts, rounding


def needs_factor(method: Any, statistics: Statistics) -> bool:
    """Whether a method rounds a weight by the factor of the Hessian in these statistics."""
    return statistics.hessian is not None and getattr(method, "rounding", "") == "gptq"


def _found(
    weight: torch.Tensor, method: Any, statistics: Statistics | None, absmax: float, changed: Changed
) -> tuple[Found, Rounding]:
    wide = changed.of(weight)
    calibrated = cast(Calibratable, method)
    if statistics is None:
        found = nearest(wide, calibrated.grid(wide.to(weight.dtype), None, absmax))
        return found, Rounding(_sums(wide, found.values))
    importance, hessian = statistics.mean_square, statistics.hessian
    factor = statistics.factor(calibrated.damping) if needs_factor(method, statistics) else None
    grid = calibrated.grid(wide.to(weight.dtype), factor.importance if factor else importance, absmax)
    if hessian is None:
        found = nearest(wide, grid)
        rounding = Rounding(_sums(wide, found.values), statistics.tokens)
        if method.changes_inputs and method.scheme.activations:
            plain = nearest(weight.float(), method.without_texts().grid(weight, None, absmax))
            _measure_products(rounding, method.scheme, wide, found.values, changed.of(plain.values), statistics.sample, changed)
        return found, rounding
    found = refitted(wide, hessian, gptq(wide, hessian, grid, factor)) if factor else nearest(wide, grid)
    plain = nearest(weight.float(), method.without_texts().grid(weight, None, absmax))
    tokens, plain_values = statistics.tokens, changed.of(plain.values)
    some = measured_rows(wide)
    rounding = Rounding(
        _sums(wide, found.values),
        tokens,
        output_error(some, measured_rows(found.values), hessian) / tokens,
        output_error(some, measured_rows(plain_values), hessian) / tokens,
        output_error(some, torch.zeros_like(some), hessian) / tokens,
        found.damping,
        found.dead,
    )
    if method.changes_inputs and method.scheme.activations:
        _measure_products(rounding, method.scheme, wide, found.values, plain_values, statistics.sample, changed)
    return found, rounding


def _measure_products(
    rounding: Rounding,
    scheme: Scheme,
    weight: torch.Tensor,
    values: torch.Tensor,
    plain: torch.Tensor,
    x: torch.Tensor,
    changed: Changed,
) -> None:
    """Puts the errors of outputs in, as they are with rounded activations. `plain` is the plain weight, changed like `weight`, and
    x float32 [tokens, in_features] the changed input, while plain rounding meets x as it was."""
    rounds, wanted = activation_rounding(scheme), x @ weight.t()
    columns = 1.0 if changed.columns is None else changed.columns
    found = {"output_error": rounds(x) @ values.t(), "plain_error": rounds(x * columns) / columns @ plain.t()}
    _measure(rounding, wanted, found)


def _measure(rounding: Rounding, wanted: torch.Tensor, products: dict[str, torch.Tensor]) -> None:
    """Puts the errors per token of products float32 [tokens, outputs] in, and the norm of what is `wanted`."""
    for name, product in {**products, "output_norm": torch.zeros_like(wanted)}.items():
        setattr(rounding, name, float((product - wanted).square_().sum(dtype=torch.float64)) / max(len(wanted), 1))


def _sums(weight: torch.Tensor, values: torch.Tensor) -> ErrorSums:
    error = (weight - values).square_().sum(dtype=torch.float64)
    return ErrorSums(float(error), float(weight.square().sum(dtype=torch.float64)))


def _write(plan: Plan, staging: Staging, work: Work, parts: Parts) -> None:
    assert work.linear is not None and work.method is not None
    weight, scheme = weight_of(work.info, work.linear, work.method, plan.dtype), work.method.scheme
    places = {o.name: o for o in work.outputs}
    for piece in plan.format.pack(weight, scheme, parts, 0):
        output = places[piece.tensor]
        flat = piece.data.detach().cpu().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        if piece.stride and len(data):
            staging.write_rows(output.file, output.start + piece.offset, data, len(data) // len(piece.data), piece.stride)
        else:
            staging.write(output.file, output.start + piece.offset, data)
