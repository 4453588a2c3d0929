"""The codes of rows under their tables, and what rounding cost: a code names the nearest entry, halfway the lower one.

Which is nearest is decided by the middles of neighbours, (lower + upper) / 2 in float32. What is not finite has the code of 0.
"""

import torch

from qcli.ops._library import define
from qcli.ops._rounding import error_sums, rows_together, total
from qcli.runtime import cpu


def _reference(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, table)
    codes, sums = _fake(x, table)
    together = rows_together(x)
    for first in range(0, len(x), together):
        here = slice(first, first + together)
        wide = x[here].float()
        entries = table[here].contiguous()
        middles = (entries[:, 1:] + entries[:, :-1]) / 2
        found = torch.searchsorted(middles, torch.where(wide.isfinite(), wide, 0.0))
        codes[here] = found.to(torch.uint8)
        sums += error_sums(wide, entries.gather(1, found))
    return codes, sums


def _fake(x, table):
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_zeros((3,), dtype=torch.float64)


def _check(x, table):
    op = "round_to_table"
    cpu.dtype_code(op, x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x has {x.dim()} dimensions, expected rows and columns")
    if table.dim() != 2 or len(table) != len(x) or table.shape[1] not in (4, 8, 16) or table.dtype != torch.float32:
        raise ValueError(f"{op}: table is {table.dtype} {list(table.shape)}, expected torch.float32 [{len(x)}, 4, 8 or 16]")


_kernel = cpu.kernel("round_to_table", "piqqippp")


def _cpu(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, table)
    x, table = x.contiguous(), table.contiguous()
    codes, _ = _fake(x, table)
    partial = torch.empty(len(x), 3, dtype=torch.float64)
    _kernel(x, cpu.dtype_code("round_to_table", x), *x.shape, table.shape[1], table, codes, partial)
    return codes, total(partial)


_op = define("round_to_table(Tensor x, Tensor table) -> (Tensor, Tensor)", _reference, _fake, _cpu)


def round_to_table(x: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, columns], float32, bfloat16 or float16; table float32 [rows, entries], 4, 8 or 16 of them, ascending and finite.

    Returns codes uint8 [rows, columns], and sums float64 [3]: squared error, squared norm, and elements that are NaN or infinite,
    which are in neither sum. Raises ValueError or TypeError for anything else.
    """
    return _op(x, table)


def cases():
    """(id, arguments) for parity tests and benchmarks."""
    generator = torch.Generator().manual_seed(0)
    for entries in (4, 8, 16):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for rows, columns in ((5, 300), (3, 1031), (7, 16), (2, 1), (0, 64)):
                x = torch.randn(rows, columns, generator=generator)
                table = torch.randn(rows, entries, generator=generator).sort(1).values
                if columns > 100:
                    x[0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e4])
                    x[1] = (table[1, 1:] + table[1, :-1]).repeat(columns)[:columns] / 2
                    table[2] = table[2, :1]
                    x[2] *= 1e-40
                yield f"{entries}-{str(dtype)[6:]}-{rows}x{columns}", {"x": x.to(dtype), "table": table}
