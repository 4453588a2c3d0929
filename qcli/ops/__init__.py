"""The ops: each file defines one, in the torch.library namespace `qcli`: its schema, its plain-torch reference, its
fake and its `cases()`. The reference is the specification, what serves on a device without a kernel, and the oracle in
tests. A file here is an op; names that begin with an underscore are shared parts.
"""

from pathlib import Path


def names() -> list[str]:
    """The ops there are, by looking at this folder; `qcli.ops.NAME` defines `torch.ops.qcli.NAME` when imported."""
    return sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
