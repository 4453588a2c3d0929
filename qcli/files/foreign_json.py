"""Reads JSON from other tools. Errors name the field, what was found and what was expected.

Headers, indexes, configs, quant_states, journals and reports come from other tools, other versions and damaged disks. Here
each is parsed, and each field that qcli uses is checked against a table of kinds. Later code sees checked values only.
A field that no table names is not checked: configs have hundreds, and most are not for qcli.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from qcli.errors import CheckpointError

_SHOWN = 60  # characters of a wrong value that a message shows
_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}


@dataclass(frozen=True)
class Kind:
    """What a field must be. `fits` decides; `words` follow "expected" in a message. null counts as absent."""

    words: str
    fits: Callable[[object], bool]


@dataclass(frozen=True)
class Required:
    """A field that must be present."""

    kind: Kind


TEXT = Kind("a string", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
OBJECT = Kind("an object", lambda v: isinstance(v, dict))
NUMBER = Kind("a finite number", lambda v: is_number(v) and _is_finite(v))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False


def is_number(value: object) -> bool:
    """Whether `value` is a JSON number. true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(least: int = 0, most: int = (1 << 63) - 1) -> Kind:
    """A whole number from `least` to `most`."""
    limits = f" from {least:,} to {most:,}" if most < 1 << 62 else f" of at least {least:,}"
    return Kind(f"a whole number{limits}", lambda v: is_whole(v) and least <= v <= most)


def at_least(least: float) -> Kind:
    """A finite number of at least `least`."""
    return Kind(f"a number of at least {least:g}", lambda v: NUMBER.fits(v) and v >= least)


def one_of(*values: object) -> Kind:
    """One of `values`."""
    words = ", ".join(map(str, values[:-1])) + (" or " if len(values) > 1 else "") + str(values[-1])
    return Kind(words, lambda v: any(type(v) is type(x) and v == x for x in values))


def list_of(kind: Kind, count: int | None = None) -> Kind:
    """A list whose items are each `kind`, with exactly `count` items if that is given."""
    return Kind(
        f"a list of {'' if count is None else f'{count} items, each '}{_plural(kind.words) if count is None else kind.words}",
        lambda v: isinstance(v, list) and count in (None, len(v)) and all(kind.fits(item) for item in v),
    )


def map_of(kind: Kind) -> Kind:
    """An object whose values are each `kind`."""
    return Kind(
        f"an object that maps names to {_plural(kind.words)}",
        lambda v: isinstance(v, dict) and all(kind.fits(item) for item in v.values()),
    )


def either(*kinds: Kind) -> Kind:
    """Any of `kinds`."""
    return Kind(" or ".join(kind.words for kind in kinds), lambda v: any(kind.fits(v) for kind in kinds))


def _plural(words: str) -> str:
    return words.removeprefix("a ").removeprefix("an ") + "s" if words.startswith(("a string", "an object")) else words


def shown(value: object) -> str:
    """A value for a message: short JSON, followed by its type."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return f"{text} ({_NAMES[type(value)]})" if type(value) in _NAMES and not isinstance(value, bool) else text


def parse(data: bytes, label: str, hint: str, *, unique: bool = False) -> object:
    """The value of JSON text in UTF-8. A byte order mark before it is accepted.

    `unique` refuses an object with the same name twice. Raises CheckpointError.
    """

    def pairs(found: list[tuple[str, object]]) -> dict:
        made = dict(found)
        if unique and len(made) != len(found):
            names = [name for name, _ in found]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{label}: the name {twice!r} occurs twice", hint)
        return made

    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=pairs)
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{label} is not valid JSON: byte {e.start:,} is not UTF-8", hint) from None
    except RecursionError:
        raise CheckpointError(f"{label} is not valid JSON: it is nested too deeply", hint) from None
    except ValueError as e:
        raise CheckpointError(f"{label} is not valid JSON: {e}", hint) from None


def parse_object(data: bytes, label: str, hint: str, *, unique: bool = False) -> dict:
    """Like `parse`, for text that must hold an object. Raises CheckpointError."""
    value = parse(data, label, hint, unique=unique)
    if not isinstance(value, dict):
        raise CheckpointError(f"{label} holds {shown(value)}, expected a JSON object", hint)
    return value


def read_object(path: Path, label: str, hint: str) -> dict:
    """Like `parse_object`, for a file. Raises CheckpointError."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise CheckpointError(f"cannot read {label}: {e.strerror}", "Check that it exists and is readable.") from e
    return parse_object(data, label, hint)


def check(value: Mapping, fields: Mapping[str, Kind | Required], label: str, hint: str | None = None) -> None:
    """Raises CheckpointError at the first of `fields` that has another kind in `value`, or is required and missing."""
    for name, kind in fields.items():
        required = isinstance(kind, Required)
        kind = kind.kind if required else kind
        found = value.get(name)
        if found is None:
            if required:
                raise CheckpointError(f"{label} has no {name}, expected {kind.words}", hint)
        elif not kind.fits(found):
            raise CheckpointError(f"{label}: {name} is {shown(found)}, expected {kind.words}", hint)


def finite(value: object) -> object:
    """A foreign value as JSON can state it: numbers that are not finite become words."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not _is_finite(value) else value
