"""qcli on this CPU compared with torch and bitsandbytes: `make bench`, or

    python benchmarks/cpu.py [--only ops,quantize,generate] [--folder FOLDER]

Ratios are ratios of medians in this process. Calls of ops, reads and writes are measured in turn. Libraries that run a whole model
or keep their own weight are measured one after the other. FOLDER (12 GB, created if missing) holds the random checkpoints. Prints a
table and writes benchmarks/results/cpu-NAME.json. benchmarks/decoding.py compares whole models with llama.cpp, too.
"""

import argparse
import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from qcli import console

sys.path.insert(0, str(Path(__file__).parent))

from measure import machine  # noqa: E402
from rows import Row, save, show  # noqa: E402


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="ops,quantize,generate")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are; a temporary one by default")
    options = parser.parse_args()
    parts = options.only.split(",")
    logging.disable(logging.WARNING)  # bitsandbytes warns at its import, and about casts at every call
    result: dict[str, object] = {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if "ops" in parts:
            import cpu_ops

            rows = cpu_ops.run(Row)
            result["rows"] += [asdict(row) for row in rows]
            show(rows, "milliseconds")
        if "quantize" in parts:
            import cpu_models

            rows = cpu_models.quantize(Row, folder)
            result["rows"] += [asdict(row) for row in rows]
            show(rows, "seconds")
        if "generate" in parts:
            import cpu_models

            rows = cpu_models.generate(Row, folder)
            result["rows"] += [asdict(row) for row in rows]
            show(rows, "tokens per second")
    if set(parts) == {"ops", "quantize", "generate"}:
        console.out(f"wrote {save('cpu', str(result['machine']['cpu']), result)}")


if __name__ == "__main__":
    main()
