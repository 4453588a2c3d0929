"""The ops: each file defines one, in the torch.library namespace `qcli`, with its schema, its plain-torch reference, its
fake and its `cases()`. The reference is the specification, what serves on any device without a kernel, and the oracle of
the tests. A file here is an op; names that begin with an underscore are shared parts.
"""

from pathlib import Path


def names() -> list[str]:
    """The ops there are, by looking at this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
