"""Writes each command's table of options into its page, between two markers, from the command itself.

    python docs/options.py     writes what is stale, and names it

A page asks for a table with the marker `<!-- options of NAME -->`; the table ends at `<!-- end of options -->`.
"""

import re
import sys
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path

from typer.models import ArgumentInfo, OptionInfo

PAGES = Path(__file__).parent
_MARKED = re.compile(r"(<!-- options of ([a-z-]+) -->\n).*?(<!-- end of options -->)", re.DOTALL)
_VALUES = {int: "N", float: "X", Path: "PATH"}  # what stands for a value where the command names nothing better


def command(name: str) -> Callable:
    """The function behind `qcli NAME`."""
    module = name.replace("-", "_")
    return getattr(import_module(f"qcli.commands.{module}"), module)


def names(parameter: Parameter, info: OptionInfo | ArgumentInfo) -> list[str]:
    """All names of an option, such as --output and -o, or --a and --no-a; of an argument, one in capitals."""
    if isinstance(info, ArgumentInfo):
        return [parameter.name.upper()]
    # Inside Annotated the first name stands where a default would.
    given = [name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str)]
    return [each for name in given for each in name.split("/")] or ["--" + parameter.name.strip("_").replace("_", "-")]


def parameters(name: str) -> Iterator[tuple[Parameter, type, OptionInfo | ArgumentInfo]]:
    """Each parameter of a command, with the type of one value and what Typer is given about it."""
    found = command(name)
    hints = typing.get_type_hints(found, include_extras=True)
    for parameter in signature(found).parameters.values():
        annotated, info = typing.get_args(hints[parameter.name])
        kinds = [kind for kind in typing.get_args(annotated) or (annotated,) if kind is not type(None)]
        yield parameter, (typing.get_args(kinds[0]) or kinds)[0], info


def table(name: str) -> str:
    """The options of a command in Markdown: names, what they do, and the default where it is one."""
    lines = ["| option | meaning |", "|---|---|"]
    for parameter, kind, info in parameters(name):
        shown = ", ".join(f"`{each}`" for each in names(parameter, info))
        if kind is not bool and shown.startswith("`-"):
            value = info.metavar or _VALUES.get(kind) or names(parameter, info)[0].rpartition("-")[2].upper()
            shown += f" `{value}`".replace("|", r"\|")
        default = parameter.default
        stated = f" Default: {default}." if info.show_default is True and default not in (None, False, Parameter.empty) else ""
        text = f"{info.help}{stated}".replace("|", r"\|").replace("<", "&lt;")
        lines.append(f"| {shown} | {text} |")
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """A page with its tables as the commands are now."""
    return _MARKED.sub(lambda found: found[1] + table(found[2]) + found[3], page)


def main() -> None:
    """Writes every page that is stale."""
    for path in sorted(PAGES.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()
