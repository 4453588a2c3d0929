"""Quantization methods. One method is one file here; its name in qcli/schemes.py is that of the file.

`make` gives the method of a scheme, with options over those of the scheme.
"""

import typing
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from typing import TYPE_CHECKING

from qcli.checkpoint.dtypes import FLOAT8
from qcli.errors import UsageError
from qcli.schemes import ROUNDINGS, SEARCHES, TOKEN_WEIGHTS, TRANSFORMS, Scheme

if TYPE_CHECKING:
    from qcli.methods._method import Method


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}  # what an option's type is in a message


def method_class(name: str) -> "type[Method]":
    """The dataclass of the method `name`."""
    found: type[Method] = import_module(f"qcli.methods.{name.replace('-', '_')}").METHOD
    return found


def option_types(scheme: Scheme) -> dict[str, type]:
    """The options that the method of `scheme` takes, with their types. A method that comes in fixed forms has none."""
    cls = method_class(scheme.method)
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls) if field.name != "form"}  # type: ignore[arg-type]


def make(scheme: Scheme, options: Mapping[str, object] | None = None) -> "Method":
    """The method that makes `scheme`, with `options` over its own. Raises UsageError."""
    known = option_types(scheme)
    options = options or {}
    for option in options:
        if option not in known:
            raise UsageError(
                f"{scheme.name} has no option {option!r}", f"Options of {scheme.name}: {', '.join(known) if known else 'none'}."
            )
        if type(options[option]) is not known[option] and not (known[option] is float and type(options[option]) is int):
            raise UsageError(f"{option} of {scheme.name} is {options[option]!r}, expected {WORDS[known[option]]}")
    own = method_class(scheme.method).of(scheme)
    if not options:
        return own
    return type(own)(**(asdict(own) | dict(options)))  # type: ignore[call-overload]


def options_of(method: "Method") -> dict[str, object]:
    """A method's options by name, as they stand in reports. A search that is not made is not named, nor is plain rounding."""
    own = vars(method)
    hidden = {"form"} | ({"search"} if own.get("search") == SEARCHES[0] else set())
    hidden |= {"rounding", "damping"} if own.get("rounding") == ROUNDINGS[0] else set()
    hidden |= {"weights"} if own.get("weights") == TOKEN_WEIGHTS[0] else set()
    hidden |= {"transform"} if own.get("transform") == TRANSFORMS[0] else set()
    hidden |= {name for name in ("outlier_share", "outliers") if name in own and not own[name]}
    return {name: value for name, value in own.items() if name not in hidden}


def entering_dtype(method: "Method", stored: str, dtype: str) -> str:
    """The dtype code in which a weight stored as `stored` enters `method`: the model's `dtype`, or what is stored where that loses
    nothing."""
    if method.casts_to_model_dtype:
        return dtype
    if stored in FLOAT8:
        return "BF16"
    return "F32" if stored == "F64" else stored
