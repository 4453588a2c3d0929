"""The product of a linear layer in every scheme that qcli runs, by width and number of tokens, beside NF4.

    python benchmarks/schemes.py [--threads N] [--rounds N]

A speed is bytes of codes and scales over seconds: for one token the product is bound by reading them. Weights are larger than the
caches, and each call takes another copy. Writes benchmarks/results/schemes.json. It takes some three minutes on two cores.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.measure import alternate, copies, machine  # noqa: E402
from qcli import formats  # noqa: E402
from qcli.checkpoint.dtypes import CODES  # noqa: E402
from qcli.formats import Stored, Weight  # noqa: E402
from qcli.methods import make  # noqa: E402
from qcli.nn import module_for  # noqa: E402
from qcli.ops.linear_table import PreparedTable, linear_table  # noqa: E402
from qcli.packing import plane_bytes  # noqa: E402
from qcli.schemes import NAMED  # noqa: E402

SCHEMES = {
    "nf4-plain": ("nf4-plain", {}),
    "nf4": ("nf4", {}),
    "int4 g128": ("rtn", {"group_size": 128}),
    "int4 g64": ("rtn", {"group_size": 64}),
    "int4 g32": ("rtn", {"group_size": 32}),
    "int4 g128, zero points": ("rtn", {"group_size": 128, "zero_point": True}),
    "int4 g64, zero points": ("rtn", {"group_size": 64, "zero_point": True}),
    "int4 rows": ("rtn", {"group_size": -1}),
    "mxfp4": ("mxfp4", {}),
    "nvfp4": ("nvfp4", {}),
    "llm-int8, activations in 16 bits": ("llm-int8", {}),
    "int8 (W8A8)": ("int8", {}),
    "int8 (W8A8), activations in 16 bits": ("int8", {}),
    "llm-int8, threshold 0": ("llm-int8", {"threshold": 0.0}),
    "int8 g128": ("rtn", {"bits": 8, "group_size": 128}),
    "fp8": ("fp8", {}),
    "fp8 blocks": ("fp8", {"share": "block"}),
}
# Weights whose codes name entries of a table: bits, columns of a block (0: rows), and whether each row has a table.
TABLES = {
    "table of 2 bits, blocks of 64": (2, 64, False),
    "table of 3 bits, blocks of 64": (3, 64, False),
    "table of 4 bits, blocks of 64": (4, 64, False),
    "table of 3 bits, rows": (3, 0, False),
    "tables of rows, 2 bits": (2, 0, True),
    "tables of rows, 3 bits": (3, 0, True),
    "tables of rows, 4 bits": (4, 0, True),
}
NAMES = (*SCHEMES, *TABLES)
WIDTHS = (1024, 2048, 4096)
TOKENS = (1, 4, 16, 128)
NBYTES = 24 << 20  # of codes


def layer(name: str, width: int) -> torch.nn.Module:
    """A layer in the scheme, with random codes, and scales near 1."""
    if name in TABLES:
        return TableLayer(*TABLES[name], width)
    method = make(NAMED[SCHEMES[name][0]], SCHEMES[name][1])
    scheme = method.scheme
    rows = NBYTES * 8 // scheme.bits // width // 128 * 128
    format = formats.holding([scheme])
    specs = [spec for spec in format.tensors(Weight("weight", rows, width, "BF16"), scheme) if format.in_module(spec)]
    tensors = {}
    for spec in specs:
        nbytes = spec.nbytes
        lowest, highest = (40, 70) if "scale" in spec.name else (0, 256)  # as E4M3 and E8M0 neither NaN nor extreme
        raw = torch.randint(lowest, highest, (nbytes,), dtype=torch.uint8)
        dtype = {code: name for name, code in CODES.items()}[spec.dtype]
        value = raw.view(getattr(torch, dtype)).view(spec.shape)
        if value.dtype in (torch.float32, torch.bfloat16):
            value = torch.rand(spec.shape).to(value.dtype) + 0.5
        tensors[format.attribute(spec.name)] = value
    held = {attribute: (CODES[str(t.dtype)[6:]], tuple(t.shape)) for attribute, t in tensors.items()}
    stored = Stored(format.layout, scheme, rows, width, held, 0.5 if scheme.double_quant else None)
    module = module_for(stored, tensors, bias=False, dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    module.arrange()
    if "16 bits" in name or name.startswith("fp8"):
        module.rounds_activations = False
    return module


class TableLayer(torch.nn.Module):
    """A layer of TABLES, with random codes and tables, and scales near 1. A table of a row needs no scale."""

    def __init__(self, bits: int, block_size: int, of_rows: bool, width: int):
        super().__init__()
        rows = NBYTES * 8 // bits // width // 128 * 128
        self.register_buffer("packed", torch.randint(0, 256, (rows, plane_bytes(width, bits)), dtype=torch.uint8))
        self.register_buffer("table", torch.randn((rows, 1 << bits) if of_rows else (1 << bits,)))
        self.register_buffer("absmax", None if of_rows else torch.rand(rows, width // (block_size or width)) + 0.5)
        self.weight = self.packed, self.table, self.absmax, None, None, bits, block_size, rows, torch.bfloat16
        self.prepared = PreparedTable(width, *self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        few = x.numel() <= PreparedTable.MOST_TOKENS * x.shape[-1]
        return self.prepared(x) if few else linear_table(x, *self.weight)


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes that one token must read."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def speeds(width: int, rounds: int) -> dict[str, dict[str, float]]:
    """GB/s by scheme and number of tokens."""
    made = {name: copies(lambda name=name: layer(name, width), NBYTES) for name in NAMES}
    sizes = {name: held_bytes(each()) for name, each in made.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in NAMES}
    for tokens in TOKENS:
        x = torch.randn(1, tokens, width).bfloat16()
        with torch.no_grad():
            runs = {name: lambda each=each, x=x: each()(x) for name, each in made.items()}
            for name, seconds in alternate(runs, rounds).items():
                found[name][str(tokens)] = round(sizes[name] / seconds / 1e9, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"machine": machine(), "widths": {}}
    for width in WIDTHS:
        found = result["widths"][str(width)] = speeds(width, args.rounds)
        print(f"width {width}, GB/s by tokens {TOKENS}; of NF4's for one token")
        for name, each in found.items():
            print(f"  {name:38} {'  '.join(f'{each[str(t)]:6.2f}' for t in TOKENS)}   {each['1'] / found['nf4']['1']:.2f}")
    (ROOT / "benchmarks/results/schemes.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
