"""Linear layers whose codes name entries of a table: NF3, the tables of rows that k-means makes, integers of 2 and 3 bits, and
codes of 4 bits in groups that do not divide rows, in the layout of any format that stores them.

In memory codes lie in planes of 2, 3 or 4 bits (qcli/packing.py), which is how qcli's own format stores them. `arrange` packs those
of other formats.
"""

import torch

from qcli import formats
from qcli.codebooks import E2M1, NF3
from qcli.formats import Stored
from qcli.nn.linear_groups import LinearGroups, order_of_columns, values_of_scale
from qcli.ops.add_sparse import add_sparse
from qcli.ops.dequantize_table import dequantize_table
from qcli.ops.linear_table import PreparedTable, linear_table
from qcli.ops.pack_codes import pack_codes
from qcli.schemes import Scheme


class LinearTable(LinearGroups):
    """`weight` and the other stored tensors by attribute, until `arrange` has laid them out. From then on `weight` has the codes,
    uint8 [out_features, bytes]; `table` float32 [2^bits] or [out_features, 2^bits] their values; `scale` and `zero_point` float32
    [out_features, groups] or None; `columns` int64 [in_features] the order of the columns or None. Of elements that are kept beside
    the codes, as many in each row, `sparse_values` float32 [count] has what they are more than their codes name, `sparse_columns`
    int32 [count] their columns, and `sparse_offsets` int32 [out_features + 1] where rows begin; or None.
    """

    _op, _prepare, _dense = staticmethod(linear_table), PreparedTable, False

    @classmethod
    def serves(cls, stored: Stored) -> bool:
        return stored.format != "bitsandbytes" and stored.scheme.runs_by_table(stored.in_features)

    def arrange(self) -> None:
        """Lays the stored tensors out for the kernels. Called once they are loaded; it does nothing a second time."""
        if self.arranged:
            return
        stored, scheme = self.stored_tensors(), self.stored.scheme
        format = formats.get(self.stored.format)
        parts = format.scales(self.stored, stored)
        columns = order_of_columns(parts)
        packed = format.planes(self.stored, stored) if columns is None else None
        if packed is None:
            codes = format.codes(self.stored, stored)
            codes = codes if columns is None else codes[:, columns]
            packed = pack_codes(codes, scheme.bits, "planes").view(torch.uint8)
        self.drop_stored()
        self.group_size = scheme.size if scheme.share == "group" else 0
        scale, zero_point, table = None, parts.get("zero_point"), parts.get("table")
        if table is None:
            scale = values_of_scale(parts["scale"], scheme.scale)
            scale = scale if "global_scale" not in parts else scale / parts["global_scale"].float()
            scale = scale.view(-1, scale.shape[-1]).expand(self.out_features, -1).contiguous()
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        self.register_buffer("table", table_of(scheme).to(packed.device) if table is None else table.float())
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", None if zero_point is None else zero_point.float().contiguous())
        self.register_buffer("columns", columns)
        self._arrange_sparse(parts)
        self.arranged = True

    def _arrange_sparse(self, parts: dict[str, torch.Tensor]) -> None:
        names = ("sparse_values", "sparse_columns", "sparse_offsets")
        for name in names:
            self.register_buffer(name, None)
        if "sparse_values" not in parts:
            return
        columns = parts["sparse_columns"].contiguous()
        dense = self._dense_rows(slice(None), torch.float32).gather(1, columns.long())
        offsets = torch.arange(self.out_features + 1, dtype=torch.int32, device=columns.device) * columns.shape[1]
        more = parts["sparse_values"].float() - dense
        for name, tensor in zip(names, (more.flatten(), columns.flatten(), offsets)):
            setattr(self, name, tensor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] to [..., out_features], in x's dtype."""
        y = super().forward(x)
        if self.sparse_values is not None:
            add_sparse(y, x, self.sparse_values, self.sparse_columns, self.sparse_offsets)
        return y

    def for_few_tokens(self):
        """See FastPath."""
        self.arrange()
        if self.sparse_values is not None:
            raise ValueError("the module does more than multiply")
        return super().for_few_tokens()

    def _arguments(self) -> tuple:
        weight = self.weight, self.table, self.scale, self.zero_point, self.bias
        return *weight, self.stored.scheme.bits, self.group_size, self.out_features, self.compute_dtype

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight [out_features, in_features] in `dtype`."""
        self.arrange()
        found = self.rows(slice(None), dtype)
        return found if self.columns is None else torch.empty_like(found).index_copy_(1, self.columns, found)

    def rows(self, ids: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows of the weight, their columns as they lie in memory."""
        self.arrange()
        if self.sparse_values is None:
            return self._dense_rows(ids, dtype)
        columns, values = (t.view(self.out_features, -1)[ids] for t in (self.sparse_columns, self.sparse_values))
        return self._dense_rows(ids, torch.float32).scatter_add_(1, columns.long(), values).to(dtype)

    def _dense_rows(self, ids: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
        """What the codes of rows name."""
        weight = self.weight[ids]
        table = self.table if self.table.dim() == 1 else self.table[ids]
        scales = (None if each is None else each[ids] for each in (self.scale, self.zero_point))
        sizes = self.stored.scheme.bits, self.group_size, len(weight), self.in_features
        return dequantize_table(weight, table, *scales, *sizes, dtype)


def table_of(scheme: Scheme) -> torch.Tensor:
    """The values of the unsigned codes of `scheme`, float32 [2^bits]."""
    if scheme.codebook:
        return torch.from_numpy({"nf3": NF3, "e2m1": E2M1}[scheme.codebook].copy())
    return torch.arange(1 << scheme.bits, dtype=torch.float32) - (1 << (scheme.bits - 1))


MODULE = LinearTable
