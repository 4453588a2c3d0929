"""Rounds one weight by what texts say of its inputs, and writes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from qcli.calibration.fisher import Fisher
from qcli.calibration.rounding import Changed, needs_factor, rounded, with_columns
from qcli.calibration.statistics import Statistics
from qcli.checkpoint import dtypes
from qcli.errors import NonFiniteError
from qcli.methods._factors import measured_rows
from qcli.methods._gptq import Found, nearest, output_error
from qcli.methods._method import Method, Parts
from qcli.methods.choosing import needs_of
from qcli.methods.errors import ErrorSums
from qcli.methods.simulate import rounding as activation_rounding
from qcli.methods.simulate import simulate, with_fixed_columns
from qcli.quantization.decoding import block_scales, read_tensor
from qcli.quantization.outputs import weight_of
from qcli.quantization.plan import Plan, Work
from qcli.quantization.shard_files import Sink
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


def by_input(works: Sequence[Work], found: Mapping[str, Statistics]) -> list[Work]:
    """Works on modules that read one input beside each other, so that the factor of its Hessian, which they share, is soon let go.
    Each asks for that factor once."""
    groups: dict[int, list[Work]] = {}
    for work in works:
        statistics = found.get(work.module)
        groups.setdefault(id(statistics) if statistics else -work.index - 1, []).append(work)
        if statistics and needs_factor(work.method, statistics):
            statistics.expect_factor(cast(Any, work.method).damping)
    return [work for group in groups.values() for work in group]


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
    staging: Sink,
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


def round_by_fisher(plan: Plan, staging: Sink, work: Work, fisher: Fisher | None, device: torch.device) -> Rounding:
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
    """The parts of a weight with columns that stay in 16 bits, and what that costs."""
    parts = with_columns(weight, method, statistics)
    values = method.decode(parts, *weight.shape)
    rounding = Rounding(_sums(weight.float(), values), statistics.tokens if statistics else 0)
    if statistics and "outlier_columns" in parts:
        some, x = measured_rows(weight), statistics.sample
        ours = with_fixed_columns(measured_rows(values), parts["outlier_columns"], method.scheme.threshold)
        plain = simulate(cast(Any, method).without_texts(), some)
        wanted = x @ some.float().t()
        _measure(rounding, wanted, {"output_error": ours.linear(x), "plain_error": plain.linear(x)})
    return parts, rounding


def _found(
    weight: torch.Tensor, method: Any, statistics: Statistics | None, absmax: float, changed: Changed
) -> tuple[Found, Rounding]:
    """The codes of a weight, and what they cost."""
    wide, found = changed.of(weight), rounded(weight, method, statistics, absmax, changed)
    if statistics is None:
        return found, Rounding(_sums(wide, found.values))
    rounding, hessian = Rounding(_sums(wide, found.values), statistics.tokens), statistics.hessian
    with_activations = method.changes_inputs and method.scheme.activations
    if hessian is None and not with_activations:
        return found, rounding
    plain = changed.of(nearest(weight.float(), method.without_texts().grid(weight, None, absmax)).values)
    if hessian is not None:
        some = measured_rows(wide)
        ours, theirs = measured_rows(found.values), measured_rows(plain)
        for name, values in {"output_error": ours, "plain_error": theirs, "output_norm": torch.zeros_like(some)}.items():
            setattr(rounding, name, output_error(some, values, hessian) / statistics.tokens)
        rounding.damping, rounding.dead = found.damping, found.dead
    if with_activations:
        _measure_products(rounding, method.scheme, wide, found.values, plain, statistics.sample, changed)
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


def _write(plan: Plan, staging: Sink, work: Work, parts: Parts) -> None:
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
