"""The version of transformers that is installed here, found without loading it. Estimates are for that version."""

from functools import cache
from importlib.metadata import version


@cache
def transformers_version() -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, version("transformers").split(".")[:2]))
