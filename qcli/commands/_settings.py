"""Options that several commands take: --set NAME=VALUE, --kv-dtype."""

from collections.abc import Iterable

from qcli.errors import UsageError


def pairs(given: Iterable[str] | None) -> dict[str, str]:
    """Name to value of what was given. Raises UsageError."""
    found = {}
    for pair in given or ():
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair!r} has no '='", "Write it as --set name=value.")
        found[name.strip()] = value.strip()
    return found


def cache_dtype(given: str | None) -> str | None:
    """--kv-dtype of a run: None keeps the model's dtype, as 16 does; int8, or 8. Raises UsageError for another."""
    known = {None: None, "16": None, "8": "int8", "int8": "int8"}
    if given not in known:
        raise UsageError(f"--kv-dtype is {given!r}", "Set it to 16 (the model's own dtype) or 8 (int8).")
    return known[given]
