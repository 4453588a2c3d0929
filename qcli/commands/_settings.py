"""--set NAME=VALUE, as several commands take it."""

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
