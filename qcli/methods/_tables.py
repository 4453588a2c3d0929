"""Tables of rows: the one-dimensional k-means of `kmeans`, and the encoder around it."""

import torch

from qcli.methods._method import Parts
from qcli.methods.errors import ErrorSums, add_up
from qcli.schemes import Scheme

_F16_MAX = 65504.0
_BETWEEN_MOVES = 5  # iterations


def tables_of(rows: torch.Tensor, bits: int, iterations: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The tables float32 [rows, 2^bits], ascending, of rows float32 [rows, columns]: Lloyd's k-means of each row by itself, which
    makes sum(weights * (value - nearest entry)^2) small. `weights` float32 [rows, columns] are 0 or more, and 1 without them; an
    element of the weight 0 does not count.

    A row begins without chance, with the elements at 2^bits even steps of the cube root of their density, which for many entries is
    the best there is (Panter and Dite, 1951). It goes on until no element changes its entry, `iterations` times at most. Then, as
    often as there are entries, the two neighbours that cost least to be one become one, and the entry that gains most by it becomes
    two. What is better after a few iterations is kept. An entry that no element is near stays where it is.
    """
    values, order = rows.sort(-1)
    mass = torch.ones_like(values, dtype=torch.float64) if weights is None else weights.gather(1, order).double()
    sums = [_running(mass * values.double() ** power) for power in (0, 1)]
    counted = values.double().masked_fill(mass == 0, -torch.inf).cummax(-1).values
    gaps = torch.nn.functional.pad(counted.diff(), (1, 0)).nan_to_num(0.0, 0.0).pow(2 / 3) * mass.pow(1 / 3)
    entries = _lloyd(values, sums, _quantiles(values, _running(gaps), bits), iterations)
    for _ in range(1 << bits):
        moved = _lloyd(values, sums, _moved(values, sums, entries), min(iterations, _BETWEEN_MOVES))
        better = _explained(values, sums, moved) > _explained(values, sums, entries)
        if not better.any():
            break
        entries = torch.where(better.unsqueeze(1), moved, entries)
    return _lloyd(values, sums, entries, iterations).float()


def _running(x: torch.Tensor) -> torch.Tensor:
    """Sums of the elements before each, and of all, [rows, columns + 1]."""
    return torch.nn.functional.pad(x.cumsum(-1), (1, 0))


def _quantiles(values: torch.Tensor, running: torch.Tensor, bits: int) -> torch.Tensor:
    """Elements of ascending rows at 2^bits even steps of a running sum, float64 [rows, 2^bits]."""
    steps = (torch.arange(1 << bits, dtype=torch.float64, device=values.device) + 0.5) / (1 << bits)
    at = torch.searchsorted(running[:, 1:].contiguous(), running[:, -1:] * steps).clamp_(max=values.shape[1] - 1)
    return values.double().gather(1, at)


def _parts_of(values: torch.Tensor, sums: list[torch.Tensor], entries: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Where the elements of each entry end, and their sums, [rows, entries]."""
    middles = ((entries[:, 1:] + entries[:, :-1]) / 2).float().contiguous()
    ends = torch.nn.functional.pad(torch.searchsorted(values, middles), (1, 0))
    ends = torch.nn.functional.pad(ends, (0, 1), value=values.shape[1])
    return ends, [each.gather(1, ends).diff() for each in sums]


def _lloyd(values: torch.Tensor, sums: list[torch.Tensor], entries: torch.Tensor, iterations: int) -> torch.Tensor:
    before = None
    for _ in range(iterations):
        ends, (mass, moment) = _parts_of(values, sums, entries)
        if before is not None and torch.equal(ends, before):
            break
        entries, before = torch.where(mass > 0, moment / mass, entries).sort(-1).values, ends
    return entries


def _moved(values: torch.Tensor, sums: list[torch.Tensor], entries: torch.Tensor) -> torch.Tensor:
    """The entries with one taken from where it saves least to where it saves most."""
    ends, (mass, moment) = _parts_of(values, sums, entries)
    centres = torch.where(mass > 0, moment / mass, entries)
    halves = torch.minimum(torch.searchsorted(values, centres.float()), ends[:, 1:]).maximum(ends[:, :-1])
    low, low_moment = (each.gather(1, halves) - each.gather(1, ends[:, :-1]) for each in sums)
    high, high_moment = mass - low, moment - low_moment
    parts = low_moment / low, high_moment / high
    gain = (low * high / mass * (parts[1] - parts[0]).square()).nan_to_num(0.0, 0.0)
    split = gain.argmax(-1, keepdim=True)
    pairs = mass[:, :-1] + mass[:, 1:]
    loss = (mass[:, :-1] * mass[:, 1:] / pairs * centres.diff().square()).nan_to_num(0.0)
    number = torch.arange(loss.shape[1], device=loss.device)
    joined = loss.masked_fill((number == split) | (number == split - 1), torch.inf).argmin(-1, keepdim=True)
    both = ((moment[:, :-1] + moment[:, 1:]) / pairs).nan_to_num(0.0).gather(1, joined)
    moved = centres.scatter(1, joined, both).scatter_(1, joined + 1, parts[1].gather(1, split))
    moved = moved.scatter_(1, split, parts[0].gather(1, split)).sort(-1).values
    return moved


def _explained(values: torch.Tensor, sums: list[torch.Tensor], entries: torch.Tensor) -> torch.Tensor:
    """What the entries take off the sum of squares of each row."""
    _, (mass, moment) = _parts_of(values, sums, entries)
    return (2 * entries * moment - entries.square() * mass).sum(-1)


def nearest_codes(rows: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The codes uint8 [rows, columns] of rows float32 under ascending tables float32 [rows, entries]. Halfway the lower entry is
    taken."""
    middles = ((table[:, 1:] + table[:, :-1]) / 2).contiguous()
    return torch.searchsorted(middles, rows.contiguous(), out_int32=True).to(torch.uint8)


class TableEncoder:
    """See qcli.methods._method.Encoder. The elements of the largest magnitudes, the same number in each row, are kept as they are,
    and do not count in the tables.

    With `weights` float32 [out_features, in_features], of 0 or more, elements count by these, and `sensitive` of those that each
    row keeps are the ones that count most beside the largest. A row in which nothing else counts has a table as without weights."""

    def __init__(
        self,
        scheme: Scheme,
        out_features: int,
        in_features: int,
        device: torch.device,
        iterations: int,
        weights: torch.Tensor | None = None,
        sensitive: int = 0,
    ):
        self.scheme, self.grain, self.iterations = scheme, in_features, iterations
        self.weights, self.sensitive = weights, sensitive
        self.kept = scheme.sparse_columns(in_features)
        dtype = torch.float16 if scheme.scale == "float16" else torch.float32
        self.table = torch.empty(out_features, 1 << scheme.bits, dtype=dtype, device=device)
        self.columns = torch.empty(out_features, self.kept, dtype=torch.int32, device=device)
        self.values = torch.empty(out_features, self.kept, device=device)
        self.dtype = torch.float32
        self.sums: dict[int, list[float]] = {}

    def feed(self, chunk: torch.Tensor, start: int) -> Parts:
        rows = chunk.view(-1, self.grain)
        finite = rows.isfinite()
        wide = rows.float().masked_fill(~finite, 0.0)
        place = slice(start // self.grain, start // self.grain + len(rows))
        columns, weights = self._counted(wide, finite, place)
        table = tables_of(wide, self.scheme.bits, self.iterations, weights)
        stored = (table.clamp(-_F16_MAX, _F16_MAX) if self.table.dtype == torch.float16 else table).to(self.table.dtype)
        codes = nearest_codes(wide, stored.float())
        values = stored.float().gather(1, codes.long()).scatter_(1, columns, wide.gather(1, columns))
        self.table[place], self.columns[place], self.values[place] = stored, columns.int(), wide.gather(1, columns)
        self.dtype = rows.dtype
        error, norm = (wide - values).masked_fill_(~finite, 0.0).square_(), wide.square()
        found = [float(each.sum(dtype=torch.float64)) for each in (error, norm)]
        self.sums[start] = [*found, int((~finite).sum())]
        return {"codes": codes}

    def _counted(self, wide: torch.Tensor, finite: torch.Tensor, place: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns int64 [rows, kept] that are kept whole, and what elements count in the tables, float32 [rows, columns]."""
        count = self.kept - self.sensitive
        columns = wide.abs().argsort(stable=True, descending=True)[:, :count]
        alike = finite.float().scatter_(1, columns, 0.0)
        if self.weights is not None:
            weights = self.weights[place] * alike
            most = weights.argsort(stable=True, descending=True)[:, : self.sensitive]
            columns = torch.cat((columns, most), 1)
            alike, weights = (each.scatter(1, most, 0.0) for each in (alike, weights))
            alike = torch.where(weights.amax(1, keepdim=True) > 0, weights, alike)
        return columns.sort(-1).values, alike

    def finish(self) -> tuple[Parts, ErrorSums]:
        parts = {"table": self.table}
        if self.kept:
            parts |= {"sparse_values": self.values.to(self.dtype), "sparse_columns": self.columns}
        return parts, add_up(self.sums)


def decode_tables(parts: Parts, out_features: int, in_features: int) -> torch.Tensor:
    """The weight float32 [out_features, in_features] that all parts together stand for."""
    codes = parts["codes"].view(out_features, in_features).long()
    values = parts["table"].float().gather(1, codes)
    if "sparse_values" in parts:
        values.scatter_(1, parts["sparse_columns"].long(), parts["sparse_values"].float())
    return values
