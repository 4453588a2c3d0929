"""The encoder of tables of rows, which `kmeans` and `squeezellm` share: which elements stay as they are, a table for the others,
and their codes."""

import torch

from qcli.methods._method import Parts
from qcli.methods.errors import ErrorSums, add_up
from qcli.ops.fit_table import fit_table
from qcli.ops.round_to_table import round_to_table
from qcli.schemes import Scheme

_F16_MAX = 65504.0


def largest_columns(sizes: torch.Tensor, count: int) -> torch.Tensor:
    """The columns of the `count` largest of each row of `sizes` [rows, columns], ascending, int64 [rows, count]. Of those that are
    alike the first are taken."""
    if not count:
        return torch.empty(len(sizes), 0, dtype=torch.int64, device=sizes.device)
    least = sizes.topk(count, sorted=False).values.amin(1, keepdim=True)
    larger, alike = sizes > least, sizes == least
    taken = larger | (alike & (alike.cumsum(1, dtype=torch.int32) <= count - larger.sum(1, keepdim=True)))
    return taken.nonzero()[:, 1].view(len(sizes), count)


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
        place = slice(start // self.grain, start // self.grain + len(rows))
        weights = None if self.weights is None else self.weights[place]
        columns = self._kept(rows, weights)
        table = fit_table(rows, self.scheme.bits, self.iterations, weights, columns.int() if self.kept else None)
        stored = (table.clamp(-_F16_MAX, _F16_MAX) if self.table.dtype == torch.float16 else table).to(self.table.dtype)
        codes, sums = round_to_table(rows, stored.float())
        error, norm, nonfinite = sums.tolist()
        self.table[place], self.dtype = stored, rows.dtype
        if self.kept:
            values = rows.gather(1, columns).float()
            values = torch.where(values.isfinite(), values, 0.0)
            rounded = stored.float().gather(1, codes.gather(1, columns).long())
            error -= float((values - rounded).square_().sum(dtype=torch.float64))  # they are stored as they are
            self.columns[place], self.values[place] = columns.int(), values
        self.sums[start] = [max(error, 0.0), norm, nonfinite]
        return {"codes": codes}

    def _kept(self, rows: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """The columns int64 [rows, kept] that are kept whole, ascending."""
        if not self.kept:
            return largest_columns(rows, 0)
        finite = rows.isfinite()
        columns = largest_columns(torch.where(finite, rows.float().abs(), 0.0), self.kept - self.sensitive)
        if not self.sensitive or weights is None:
            return columns
        counted = torch.where(finite, weights.nan_to_num(0.0, 0.0, 0.0), 0.0)
        others = counted.scatter_(1, columns, -1.0)  # nothing is kept twice
        return torch.cat((columns, largest_columns(others, self.sensitive)), 1).sort(-1).values

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
