"""Quantization methods. One method is one file here, found by its name; `_blockwise.py` and `_base.py` are shared parts."""

import difflib
from dataclasses import fields
from importlib import import_module
from pathlib import Path

from qcli.errors import UsageError

DEFAULT_BY_BITS = {4: "nf4", 8: "llm-int8"}


def names() -> list[str]:
    """The methods there are, by looking at this folder."""
    return sorted(p.stem.replace("_", "-") for p in Path(__file__).parent.glob("[a-z]*.py"))


def method_name(bits: int | None, method: str | None) -> str:
    """The method that `--bits` and `--method` ask for together. Raises UsageError where they disagree."""
    if bits is not None and bits not in DEFAULT_BY_BITS:
        raise UsageError(f"bits is {bits}, expected 4 or 8", "Use --bits 4 for NF4, --bits 8 for LLM.int8().")
    if method is None:
        return DEFAULT_BY_BITS[bits or 4]
    if method not in names():
        near = difflib.get_close_matches(method, names(), n=2, cutoff=0.4) or names()
        raise UsageError(f"there is no method {method!r}; nearest: {', '.join(near)}", f"Methods: {', '.join(names())}.")
    if bits is not None and method_class(method).bits != bits:
        raise UsageError(
            f"--method {method} stores {method_class(method).bits} bits, and --bits {bits} was given", "Leave out one of the two."
        )
    return method


def method_class(name: str) -> type:
    """The dataclass of the method `name`."""
    return import_module(f"qcli.methods.{name.replace('-', '_')}").METHOD


def make_method(name: str, options: dict[str, object]):
    """The method `name` with `options`, checked against its dataclass. Raises UsageError."""
    chosen = method_class(name)
    known = [f.name for f in fields(chosen)]
    for option in options:
        if option not in known:
            raise UsageError(f"{name} has no option {option!r}", f"Options of {name}: {', '.join(known) if known else 'none'}.")
    return chosen(**options)
