"""A table of a few values for each row: the centres of a one-dimensional k-means of its elements, near the best there is.

For K entries, what is made small is sum(weight * (value - nearest entry)^2) over the elements that count: those that are finite,
are not left out, and have a finite weight above 0. Where there is no such weight, the others count alike.

Sorted by value, and those of one value by column, the elements have the running sums M of their weights and S of weight * value, in
float64, in this order. All else needs these sums alone, at the borders of groups of one value.
  bins     With more than B = 8 K different values, B bins of even steps of the running sum of sqrt(gap * weight) over the groups,
           where a gap is the distance from the value before. Else each value has a bin.
  start    The best partition of the bins into K intervals, by dynamic programming: the one with the largest sum of S_k^2 / M_k.
           Of partitions that are as good, the first. The last interval of the best partition of fewer bins begins no later (what
           an interval saves is of the Monge kind): for the bins 8 t + 1 to 8 t + 8 it is sought from where it begins for bin 8 t.
  Lloyd    An entry becomes the mean S_k / M_k of what is nearest to it, until no element changes its entry, or `iterations` times.
           Halfway the lower entry is nearer. An entry that nothing is near stays where it is.
Over all n values the program would find the best there is in time n^2 (Wang and Song, "Ckmeans.1d.dp", 2011). Bins make it cheap:
with 8 of them for an entry the result is some 0.1% from the best. Nothing is drawn by chance. A row knows nothing of the others.
"""

import torch

from qcli.ops._library import define
from qcli.ops._rounding import rows_together
from qcli.runtime import cpu

BINS = 8  # for each entry
_BLOCK = 8  # bins whose begins are sought together


def _reference(
    x: torch.Tensor, bits: int, iterations: int, weights: torch.Tensor | None, left_out: torch.Tensor | None
) -> torch.Tensor:
    _check(x, bits, iterations, weights, left_out)
    table = _fake(x, bits, iterations, weights, left_out)
    if not x.numel():
        return table.zero_()
    bins = BINS << bits
    together = min(rows_together(x), max(1, rows_together(x.new_empty((0, bins * bins))) * 8))
    for first in range(0, len(x), together):
        here = slice(first, first + together)
        table[here] = _fit(x[here], bits, iterations, *(None if each is None else each[here] for each in (weights, left_out)))
    return table


def _fit(x, bits, iterations, weights, left_out):
    values, ends, sums = _groups(*_counted(x, weights, left_out))
    borders = _borders(values, sums, ends, BINS << bits)
    parts = _best_parts([each.gather(1, borders) for each in sums], 1 << bits)
    return _lloyd(values, sums, borders.gather(1, parts), iterations)


def _counted(x, weights, left_out):
    """The values float32 and the weights float32 [rows, columns], which are 0 where an element does not count."""
    alike = x.isfinite().float()
    if left_out is not None:
        alike.scatter_(1, left_out.long(), 0.0)
    if weights is not None:
        counted = torch.where(weights.isfinite(), weights.clamp(min=0), 0.0).nan_to_num_(0.0) * alike
        alike = torch.where(counted.amax(1, keepdim=True) > 0, counted, alike)
    return x.float() + 0.0, alike


def _groups(x, weights):
    """The different values that count, ascending, float32 [rows, columns] with infinity after the last; their number [rows]; and
    [M, S], float64 [rows, columns + 1], before each of them and after the last."""
    counts = weights > 0
    values, order = x.masked_fill(~counts, torch.inf).sort(stable=True)
    mass, counts = weights.gather(1, order).double(), counts.gather(1, order)
    running = [torch.nn.functional.pad(each.cumsum(1), (1, 0)) for each in (mass, mass * torch.where(counts, values, 0.0).double())]
    new = torch.cat((torch.ones_like(counts[:, :1]), values[:, 1:] != values[:, :-1]), 1)
    number = torch.arange(values.shape[1], device=x.device)
    after = torch.searchsorted(new.cumsum(1) - 1, number.expand_as(order).contiguous(), right=True)
    found = (new & counts).sum(1, keepdim=True)
    distinct = values.gather(1, after - 1).masked_fill_(number >= found, torch.inf)
    after = torch.nn.functional.pad(after, (1, 0))
    return distinct, found, [each.gather(1, after) for each in running]


def _borders(values, sums, count, bins):
    """Where bins begin, and where the last one ends, among the groups: int64 [rows, bins + 1]."""
    number = torch.arange(values.shape[1], device=values.device)
    gap = values[:, 1:].double() - values[:, :-1].double()
    steps = (gap * sums[0].diff()[:, 1:]).sqrt_().masked_fill_(number[1:] >= count, 0.0)
    running = torch.nn.functional.pad(steps.cumsum(1), (1, 0))
    places = torch.arange(bins + 1, device=values.device)
    borders = torch.searchsorted(running, running[:, -1:] * (places.double() / bins))
    borders[:, -1:] = count
    return torch.where(count <= bins, torch.minimum(places, count), borders)


def _best_parts(sums, entries):
    """The borders of the best partition of bins into `entries` intervals, as numbers of bins: int64 [rows, entries + 1]. `sums` are
    M and S at the borders of bins, float64 [rows, bins + 1]."""
    mass, moment = (each.unsqueeze(1) - each.unsqueeze(2) for each in sums)
    number = torch.arange(mass.shape[1], device=mass.device)
    gain = torch.where(mass > 0, moment * moment / mass, 0.0)  # of an interval from bin i to bin j, [rows, i, j]
    gain.masked_fill_(number.unsqueeze(1) > number, -torch.inf)
    best, begins = gain[:, 0], []
    for _ in range(entries - 1):
        before, best, begin = best, torch.zeros_like(best), torch.zeros_like(best, dtype=torch.int64)
        for first in range(1, len(number), _BLOCK):
            here = slice(first, first + _BLOCK)
            saved = before[:, : here.stop].unsqueeze(2) + gain[:, : here.stop, here]
            saved.masked_fill_((number[: here.stop] < begin[:, first - 1 : first]).unsqueeze(2), -torch.inf)
            best[:, here], begin[:, here] = saved.max(1)
        begins.append(begin)
    parts = [torch.full_like(begins[0][:, :1], mass.shape[1] - 1)]
    for begin in reversed(begins):
        parts.append(begin.gather(1, parts[-1]))
    return torch.cat((torch.zeros_like(parts[0]), *reversed(parts)), 1)


def _lloyd(values, sums, ends, iterations):
    """The entries float32 [rows, entries], ascending, of intervals of groups that end at `ends` [rows, entries + 1]."""
    last = ends[:, -1:]
    entries = values.gather(1, torch.minimum(ends[:, :-1], (last - 1).clamp_(min=0))).double().masked_fill_(last == 0, 0.0)
    going = torch.ones_like(last, dtype=torch.bool)
    for _ in range(iterations):
        mass, moment = (each.gather(1, ends).diff() for each in sums)
        entries = torch.where(going, torch.where(mass > 0, moment / mass, entries).sort(-1).values, entries)
        middles = ((entries[:, 1:] + entries[:, :-1]) / 2).float()
        found = torch.cat((ends[:, :1], torch.minimum(torch.searchsorted(values, middles), last), last), 1)
        going &= (found != ends).any(1, keepdim=True)
        if not going.any():
            break
        ends = torch.where(going, found, ends)
    return entries.float()


def _fake(x, bits, iterations, weights, left_out):
    return x.new_empty((x.shape[0], 1 << bits), dtype=torch.float32)


def _check(x, bits, iterations, weights, left_out):
    op, columns = "fit_table", x.shape[-1]
    cpu.dtype_code(op, x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has {x.dim()} dimensions, expected rows and columns")
    if not 2 <= bits <= 4:
        raise ValueError(f"{op}: bits is {bits}, expected 2 to 4")
    if iterations < 1:
        raise ValueError(f"{op}: iterations is {iterations}, expected at least 1")
    if weights is not None and (weights.shape != x.shape or weights.dtype != torch.float32):
        raise ValueError(f"{op}: weights are {weights.dtype} {list(weights.shape)}, expected torch.float32 {list(x.shape)}")
    if left_out is not None and (left_out.dim() != 2 or len(left_out) != len(x) or left_out.dtype != torch.int32):
        raise ValueError(f"{op}: left_out is {left_out.dtype} {list(left_out.shape)}, expected torch.int32 [{len(x)}, count]")
    if left_out is not None and left_out.numel() and not 0 <= int(left_out.min()) <= int(left_out.max()) < columns:
        found = f"{int(left_out.min())} to {int(left_out.max())}"
        raise ValueError(f"{op}: left_out has columns from {found}, expected 0 to {columns - 1}")


_kernel = cpu.kernel("fit_table", "piqqiiippqp")


def _cpu(x: torch.Tensor, bits: int, iterations: int, weights: torch.Tensor | None, left_out: torch.Tensor | None) -> torch.Tensor:
    _check(x, bits, iterations, weights, left_out)
    x = x.contiguous()
    table = _fake(x, bits, iterations, weights, left_out)
    kept = 0 if left_out is None else left_out.shape[1]
    given = (None if each is None else each.contiguous() for each in (weights, left_out))
    _kernel(x, cpu.dtype_code("fit_table", x), *x.shape, bits, BINS << bits, iterations, *given, kept, table)
    return table


_op = define("fit_table(Tensor x, int bits, int iterations, Tensor? weights, Tensor? left_out) -> Tensor", _reference, _fake, _cpu)


def fit_table(
    x: torch.Tensor, bits: int, iterations: int, weights: torch.Tensor | None = None, left_out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [rows, columns], float32, bfloat16 or float16. bits is 2, 3 or 4, of 2^bits entries. weights float32 [rows, columns];
    left_out int32 [rows, count] are columns that do not count. iterations are the most of Lloyd's algorithm, 1 or more.

    Returns the tables float32 [rows, 2^bits], ascending; zeros for a row in which nothing counts. Raises ValueError or TypeError
    for anything else.
    """
    return _op(x, bits, iterations, weights, left_out)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows, columns in ((5, 300), (3, 1031), (4, 20), (2, 1), (0, 64)):
                x = torch.randn(rows, columns, generator=generator)
                x *= 1 + 5 * (torch.rand(rows, columns, generator=generator) < 0.02)
                weights = torch.randn(rows, columns, generator=generator).square().pow_(3)
                weights[:, ::5] = 0
                left_out = (
                    torch.rand(rows, columns, generator=generator)
                    .argsort(1)[:, : columns // 50]
                    .flatten()
                    .view(rows, columns // 50)
                    .int()
                )
                name = f"{bits}-{str(dtype)[6:]}-{rows}x{columns}"
                given = {"x": x.to(dtype), "bits": bits, "iterations": 50}
                yield name, given | {"weights": None, "left_out": None}
                yield f"{name}-weighted", given | {"weights": weights, "left_out": None}
                yield f"{name}-left-out", given | {"weights": None, "left_out": left_out}
                yield f"{name}-once", given | {"iterations": 1, "weights": weights, "left_out": left_out}
            hostile = torch.randn(14, 96, generator=generator)
            hostile[0] = 0
            hostile[1] = torch.nan
            hostile[2, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38])
            hostile[3] = torch.arange(96) % 3
            hostile[4] = 7
            hostile[5, ::2] = -0.0
            hostile[5, 1::4] = 0.0
            hostile[6] *= 1e-40
            hostile[7] *= 1e30
            hostile[8] += 3000
            hostile[9] = torch.arange(96)
            weights = torch.rand(14, 96, generator=generator)
            weights[10] = 0
            weights[11, 1:] = 0
            weights[12, :4] = torch.tensor([torch.nan, torch.inf, -1.0, 1e-45])
            weights[13] *= 1e-30
            given = {"x": hostile.to(dtype), "bits": bits, "iterations": 50}
            yield f"{bits}-{str(dtype)[6:]}-hostile", given | {"weights": None, "left_out": None}
            yield f"{bits}-{str(dtype)[6:]}-hostile-weighted", given | {"weights": weights, "left_out": None}
