"""What the estimate is of: the transformers that is installed here, told without loading it."""

from functools import cache
from importlib.metadata import version


@cache
def transformers_version() -> tuple[int, ...]:
    """Major and minor version."""
    return tuple(map(int, version("transformers").split(".")[:2]))
