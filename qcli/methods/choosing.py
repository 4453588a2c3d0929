"""From the options of a command to a recipe, and from a recipe to methods, whether on disk or while loading."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import replace

from qcli import formats, methods
from qcli.errors import UsageError
from qcli.methods._calibrated import Needs
from qcli.methods._method import Method
from qcli.recipe import KEEP, Choice, Recipe
from qcli.schemes import BY_BITS, NAMED, by_bits, head_bits, named

# What --bits alone means in formats that hold integers and no NF4: round to nearest, with these settings.
_OF_INTEGERS: Mapping[str, dict[str, object]] = {"compressed-tensors": {}, "gptq": {}, "awq": {"zero_point": True}}


def made(choice: Choice) -> Method:
    """The method of a recipe's choice, with its options. Raises UsageError."""
    return methods.make(named(choice.method), dict(choice.options))


def methods_of(recipe: Recipe) -> list[Method]:
    """The methods of a recipe, that of its default first; that of its head where it has no other. Raises UsageError where it keeps
    every module as it is."""
    found = [made(choice) for choice in (recipe.default, *(choice for _, choice in recipe.rules)) if not choice.keeps]
    if not found and recipe.head is not None:
        found = [made(recipe.head)]
    if not found:
        raise UsageError("the recipe keeps every module as it is", "Give its default or one of its rules a method.")
    return found


def calibrated(choice: Choice) -> Choice:
    """The same choice with all that texts can give its method, unless its options say how it rounds. A method that texts do not
    help stays as it is."""
    if choice.keeps:
        return choice
    method = made(choice)
    if (with_texts := getattr(method, "with_texts", None)) is not None:
        name, options = with_texts
        choice = Choice(name, tuple(options.items()))
        method = made(choice)
    by_texts = getattr(method, "by_texts", None)
    if by_texts is None:
        return choice
    own, given = dict(choice.options), vars(by_texts())
    names = ("search", "rounding", "transform", "outlier_share")
    added = {name: given[name] for name in names if name in given and name not in own}
    return Choice(choice.method, tuple((own | added).items()))


def needs_of(method: Method) -> Needs:
    """What a method must know of the inputs of a module."""
    found: Needs = getattr(method, "needs", "nothing")
    return found


def report_of(method: Method) -> str:
    """The path of the report that names the columns which a method keeps in 16 bits; empty where none does."""
    found = getattr(method, "outliers", "")
    return found if isinstance(found, str) else ""


def as_asked(method: Method) -> Method:
    """The method without the share of columns that a report came to in its module."""
    return replace(method, outlier_share=0.0) if report_of(method) else method  # type: ignore[type-var]


def weighs_tokens(method: Method) -> bool:
    """Whether tokens count by squared gradients in what a method knows of the inputs of a module."""
    return getattr(method, "weights", "none") == "fisher" and needs_of(method) in ("moments", "hessian")


def head_choice(bits: int | None, body: Choice) -> Choice | None:
    """What `--head` asks for beside `body`, the choice for the other modules: the same method, if it stores that many bits, else
    NF4 or LLM.int8(). None for 16 bits. Raises UsageError."""
    asked = head_bits(bits)
    if asked is None:
        return None
    return body if not body.keeps and made(body).scheme.bits == asked else Choice(BY_BITS[asked])


def recipe_in_force(
    recipe: Recipe | None,
    bits: int | None,
    method: str | None,
    options: Mapping[str, object],
    skip: Iterable[str] = (),
    format: str | None = None,
    settings: Mapping[str, object] | None = None,
    others: Mapping[str, type] | None = None,
    head: int | None = None,
    calibrate: bool = False,
) -> tuple[Recipe, dict[str, object]]:
    """What the options of a command ask for together, and those of `settings` that are no method's.

    `options` are the method's by name, None where not given; `settings` are name=value pairs, whose text is converted; `others` are
    names, with types, that may stand among them beside the method's. `head` is the bits of the output head. Without a method,
    `bits` mean `rtn` in a format of integers. With `calibrate`, texts decide where a method can use them. Raises UsageError.
    """
    given = {name: value for name, value in options.items() if value is not None}
    kept = tuple((glob, Choice(KEEP)) for glob in skip)
    if recipe is not None:
        twice = next((name for name, value in {"bits": bits, "method": method, **given}.items() if value is not None), None)
        if twice:
            raise UsageError(f"--recipe and --{twice.replace('_', '-')} were both given", "Leave out one, or put it in the recipe.")
        _, rest = sorted_settings("a recipe", {}, settings or {}, others or {})
        of_head = recipe.head if head is None else head_choice(head, recipe.default)
        recipe = replace(recipe, rules=(*kept, *recipe.rules), head=of_head, format=format or recipe.format)
        if calibrate:
            rules = tuple((glob, calibrated(choice)) for glob, choice in recipe.rules)
            recipe = replace(recipe, default=calibrated(recipe.default), rules=rules)
        return recipe, rest
    scheme = by_bits(bits, method)
    if method is None and format in _OF_INTEGERS:
        scheme, bits = NAMED["rtn"], bits or 4
        settings = _OF_INTEGERS[format or ""] | dict(settings or {})
    own, rest = sorted_settings(scheme.name, methods.option_types(scheme), settings or {}, others or {})
    own |= given
    if bits is not None and bits != scheme.bits:
        if "bits" not in methods.option_types(scheme):
            raise UsageError(
                f"--method {method} stores {scheme.bits} bits, and --bits {bits} was given", "Leave out one of the two."
            )
        own["bits"] = bits
    methods.make(scheme, own)  # raises here what is wrong with an option
    if scheme.name in formats.NAMES:
        format = format or scheme.name  # awq
    body = Choice(scheme.name, tuple(own.items()))
    of_head = head_choice(head, body)
    return Recipe(calibrated(body) if calibrate else body, kept, of_head, format), rest


def sorted_settings(
    what: str, of_method: Mapping[str, type], settings: Mapping[str, object], others: Mapping[str, type]
) -> tuple[dict[str, object], dict[str, object]]:
    """Sorts name=value settings into the options `of_method` and the `others`, with values of their types. Raises UsageError."""
    own: dict[str, object] = {}
    rest: dict[str, object] = {}
    every = {**of_method, **others}
    for name, value in settings.items():
        if name not in every:
            near = difflib.get_close_matches(name, every, n=2, cutoff=0.4) or list(every)
            raise UsageError(f"{what} has no setting {name!r}; nearest: {', '.join(near)}", f"Settings: {', '.join(every)}.")
        (own if name in of_method else rest)[name] = _convert(name, value, every[name])
    return own, rest


def _convert(name: str, value: object, kind: type) -> object:
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UsageError(f"{name} is {value!r}, expected true or false")
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} is {value!r}, expected {methods.WORDS[kind]}") from None
