"""The ops, one per file, in the torch.library namespace `qcli`. A file has the op's schema, its reference in plain torch, its fake
and its `cases()`.

The reference is the specification. It also runs on devices without a kernel, and tests compare kernels with it. Files whose name
begins with an underscore are shared parts, not ops.
"""

from pathlib import Path


def names() -> list[str]:
    """The names of all ops, from the files in this folder. Importing `qcli.ops.NAME` defines `torch.ops.qcli.NAME`."""
    return sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
