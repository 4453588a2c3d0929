"""Which module gets which method: the currency between the verbs, and as JSON between people.

`--bits`, `--method`, `--skip` and `--skip-from` are ways to write a recipe. `qcli quantize --recipe FILE` reads one, and the plan
that `--dry-run --json` prints holds the one in force:

    {"default": {"method": "nf4"},
     "rules": [["*.down_proj", {"method": "nf4", "options": {"block_size": 32}}], ["model.layers.0", {"method": "keep"}]],
     "head": {"method": "llm-int8"},
     "format": "qcli"}
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from qcli.errors import CheckpointError, UsageError
from qcli.files.foreign_json import OBJECT, TEXT, Kind, Required, check, read_object, shown
from qcli.schemes import named

KEEP = "keep"  # the method of a module that stays as it is
_CHOICE: Mapping[str, Kind | Required] = {"method": Required(TEXT), "options": OBJECT}
_LIST = Kind("a list", lambda value: isinstance(value, list))
_RECIPE: Mapping[str, Kind | Required] = {"default": Required(OBJECT), "rules": _LIST, "head": OBJECT, "format": TEXT}
_FILES = ("outliers",)  # options that are the path of a file, where they are text
_HINT = "See docs/recipes.md for what a recipe holds."


@dataclass(frozen=True)
class Choice:
    """A method by its name in qcli/schemes.py, or `keep`, with options over the name's own."""

    method: str
    options: tuple[tuple[str, object], ...] = ()

    @property
    def keeps(self) -> bool:
        """Whether the module stays as it is."""
        return self.method == KEEP

    def summary(self) -> dict[str, object]:
        """For JSON."""
        return {"method": self.method} | ({"options": dict(self.options)} if self.options else {})

    def without_folders(self) -> "Choice":
        """The same with the names of files in the place of their paths, as the files of a result state it."""
        return replace(self, options=tuple(without_folders(dict(self.options)).items()))


def without_folders(options: Mapping[str, object]) -> dict[str, object]:
    """Options with the names of files in the place of their paths."""
    return {name: Path(each).name if name in _FILES and isinstance(each, str) else each for name, each in options.items()}


@dataclass(frozen=True)
class Recipe:
    """`rules` are (glob, choice): the first whose glob matches a module, or a parent of it, decides; else `default`.

    `head` is for the output head, which stays in 16 bits without it, and for the embedding that is tied to it.
    """

    default: Choice
    rules: tuple[tuple[str, Choice], ...] = ()
    head: Choice | None = None
    format: str | None = None  # None: the widest-read one that holds all of it

    def choice(self, module: str) -> Choice:
        """What becomes of a module, by its full name in transformers."""
        return next((choice for glob, choice in self.rules if matches(module, glob)), self.default)

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """The globs that match none of `modules`: most often a slip of the pen."""
        modules = list(modules)
        return [glob for glob, _ in self.rules if not any(matches(module, glob) for module in modules)]

    def without_folders(self) -> "Recipe":
        """See Choice."""
        rules = tuple((glob, choice.without_folders()) for glob, choice in self.rules)
        head = None if self.head is None else self.head.without_folders()
        return replace(self, default=self.default.without_folders(), rules=rules, head=head)

    def summary(self) -> dict[str, object]:
        """For JSON, as `read_recipe` takes it."""
        found: dict[str, object] = {"default": self.default.summary()}
        if self.rules:
            found["rules"] = [[glob, choice.summary()] for glob, choice in self.rules]
        if self.head:
            found["head"] = self.head.summary()
        return found | ({"format": self.format} if self.format else {})


def matches(module: str, glob: str) -> bool:
    """Whether `glob` matches the full name of `module` or of one of its parents."""
    parts = module.split(".")
    return any(fnmatchcase(".".join(parts[:n]), glob) for n in range(1, len(parts) + 1))


def read_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file, or under `recipe` in the plan that --dry-run --json prints. Each field is checked. Raises
    UsageError."""
    label = str(path)
    try:
        found = read_object(path, label, _HINT)
        if isinstance(found.get("recipe"), dict):
            found, label = found["recipe"], f"{label}: recipe"
        return recipe_of(found, label)
    except CheckpointError as e:
        raise UsageError(e.message, e.hint) from e


def recipe_of(value: dict[str, Any], label: str) -> Recipe:
    """The recipe that a JSON object states. `label` names it in messages. Raises CheckpointError, UsageError."""
    _check(value, _RECIPE, label)
    rules = []
    for number, rule in enumerate(value.get("rules") or (), 1):
        where = f"{label}: rule {number}"
        if not (isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str) and isinstance(rule[1], dict)):
            raise CheckpointError(f"{where} is {shown(rule)}, expected a list of a glob and an object with a method", _HINT)
        rules.append((rule[0], _choice(rule[1], f"{where} ({rule[0]})")))
    head = _choice(value["head"], f"{label}: head") if value.get("head") is not None else None
    head = None if head is None or head.keeps else head
    return Recipe(_choice(value["default"], f"{label}: default"), tuple(rules), head, value.get("format"))


def _choice(value: dict[str, Any], label: str) -> Choice:
    _check(value, _CHOICE, label)
    name = value["method"] if value["method"] == KEEP else named(value["method"]).name
    return Choice(name, tuple((value.get("options") or {}).items()))


def _check(value: dict[str, Any], known: Mapping[str, Kind | Required], label: str) -> None:
    check(value, known, label, _HINT)
    others = [key for key in value if key not in known]
    if others:
        raise CheckpointError(f"{label} has a field {others[0]!r}, expected {', '.join(known)}", _HINT)
