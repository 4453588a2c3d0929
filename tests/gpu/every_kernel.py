"""Launches every kernel of kernels/cuda/ on small inputs, under compute-sanitizer: python -m tests.gpu.every_kernel"""

import re
import sys
from importlib import import_module
from unittest import mock

import torch

from qcli.ops import linear_int8
from qcli.runtime import cuda, nvcc
from tests.gpu.checks import KERNELS, kernel, moved, noting
from tests.gpu.inputs import hostile

_ENTRY = re.compile(r"^KERNEL\s+void\s+(?:__launch_bounds__\(.*\)\s+)?(\w+)\(", re.MULTILINE)


def entries() -> set[str]:
    """The names of all kernels."""
    return {name for path in nvcc.folder().glob("*.cu") for name in _ENTRY.findall(path.read_text())}


def launch(names: list[str], device: torch.device, dtypes=(torch.bfloat16, torch.float32)) -> set[str]:
    """Runs the ops' kernels on their own cases in 16 bits and on hostile inputs. Returns the kernels that were launched."""
    fits = lambda x, columns: x.dtype != torch.float32 and columns % 16 == 0  # noqa: E731
    with noting() as launched:
        for name in names:
            own = ((case, a) for case, a in import_module(f"qcli.ops.{name}").cases() if "bfloat16" in case)
            for _, arguments in (*own, *hostile(name, dtypes)):
                given = moved(arguments, device)
                kernel(name, given)
                if name == "linear_int8":
                    with mock.patch.object(linear_int8, "_fuses", fits):
                        kernel(name, given)
    return launched


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU")
    device = torch.device("cuda", 0)
    if problem := cuda.problem(device):
        sys.exit(f"{problem.message}; {problem.hint}")
    torch.manual_seed(0)
    launched = launch(KERNELS, device)
    torch.cuda.synchronize()
    if missing := entries() - launched:
        sys.exit(f"not launched: {', '.join(sorted(missing))}")
    print(f"{len(launched)} kernels launched")


if __name__ == "__main__":
    main()
