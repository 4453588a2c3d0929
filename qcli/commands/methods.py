"""`qcli methods`: what methods there are, what they cost, and the options of one."""

import json as json_
from importlib.resources import files
from typing import Annotated, Any

import typer

from qcli import console, formats, schemes
from qcli.schemes import BY_TEXTS, NAMED, Scheme

_SHARES = {
    "flat": "{size} weights of the flattened matrix",
    "group": "{size} weights of a row",
    "row": "a row",
    "block": "a square of {size} x {size}",
    "tensor": "the weight",
}
_FLOATS = {"e4m3": "E4M3", "e2m1": "E2M1"}


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to see its options.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """List the methods of quantization, what holds and runs them, and what each costs on two models."""
    measured = _measured()
    chosen = [schemes.named(name)] if name else list(NAMED.values())
    found = [_summary(scheme, measured) for scheme in chosen if scheme.bits or name]
    if name:
        found[0]["options"] = _options(chosen[0])
    if json:
        console.json({"methods": found, "measured": measured["about"]})
    elif name:
        _show_one(found[0], measured)
    else:
        _show_all(found, measured)


def _measured() -> dict[str, Any]:
    """What benchmarks/methods.py has measured."""
    found: dict[str, Any] = json_.loads(files("qcli.methods").joinpath("measured.json").read_text())
    return found


def _summary(scheme: Scheme, measured: dict[str, Any]) -> dict[str, Any]:
    held = [each.name for each in formats.all_formats() if scheme.bits and each.refuses(scheme) is None]
    held += [each.name for each in formats.all_formats() if scheme.method == "rtn" and _with_zero_points(each, scheme)]
    return {
        "name": scheme.name,
        "bits": scheme.bits,
        "scale_for": _SHARES[scheme.share].format(size=scheme.size),
        "codes": _FLOATS.get(scheme.codebook or "", scheme.codebook or f"int{scheme.bits}"),
        "activations": _activations(scheme),
        "needs_calibration": scheme.name in BY_TEXTS,
        "formats": [name for name in formats.NAMES if name in held],
        "runs": "CPU and CUDA" if held else "evaluate alone",
        "measured": {model: of[scheme.name] for model, of in measured["models"].items() if scheme.name in of},
    }


def _with_zero_points(format: formats.Format, scheme: Scheme) -> bool:
    from dataclasses import replace

    return format.refuses(replace(scheme, zero_point=True)) is None


def _activations(scheme: Scheme) -> str:
    if scheme.activations is None:
        return "16 bits"
    kind = _FLOATS.get(scheme.activation_codebook or "", "int8")
    return f"{kind}, but outlier columns" if scheme.threshold else kind


def _options(scheme: Scheme) -> list[dict[str, Any]]:
    from qcli import methods as modules

    own = vars(modules.method_class(scheme.method).of(scheme))
    types = modules.option_types(scheme)
    return [{"name": option, "type": types[option].__name__, "default": own[option]} for option in types]


def _show_all(found: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    models = list(measured["models"])
    columns = [
        "method",
        "codes",
        "a scale for",
        "activations",
        "formats",
        *(f"{part} {m}" for m in models for part in ("bits", "KL")),
    ]
    rows = []
    for each in found:
        costs = [each["measured"].get(model) for model in models]
        shown = [value for cost in costs for value in (_number(cost, "bits"), _number(cost, "kl"))]
        rows.append(
            (each["name"], each["codes"], each["scale_for"], each["activations"], ", ".join(each["formats"]) or "none", *shown)
        )
    console.table("", columns, rows, left=(0, 1, 2, 3, 4))
    console.out(measured["about"])
    console.out(f"{' and '.join(BY_TEXTS)} need texts, and are measured by the run that makes them.")
    console.out("What no format holds, `qcli evaluate --methods` simulates. Options: qcli methods NAME")


def _show_one(found: dict[str, Any], measured: dict[str, Any]) -> None:
    console.out(
        f"{found['name']}: {found['codes']} codes, a scale for {found['scale_for']}; activations in {found['activations']}; "
        f"formats: {', '.join(found['formats']) or 'none'}"
    )
    for model, cost in found["measured"].items():
        console.out(f"{model}: {_number(cost, 'bits')} bits a weight, KL {_number(cost, 'kl')}")
    rows = [(option["name"], option["type"], str(option["default"]).lower(), _flag(option["name"])) for option in found["options"]]
    if rows:
        console.table("", ("option", "type", "default", "on the command line"), rows, left=(0, 1, 2, 3))
    else:
        console.out("It has no options.")
    console.out(measured["about"])


def _flag(option: str) -> str:
    known = {"block_size", "threshold", "group_size", "bits", "search", "double_quant"}
    return f"--{option.replace('_', '-')}" if option in known else f"--set {option}=VALUE"


def _number(cost: dict[str, float] | None, key: str) -> str:
    if cost is None:
        return "-"
    return f"{cost[key]:.2f}" if key == "bits" else f"{cost[key]:.2g}"
