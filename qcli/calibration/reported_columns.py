"""Columns of weights that stay in 16 bits, as a report of `qcli inspect-outliers --json` names them. No torch.

A module that reads the hidden state, as q, k, v, gate and up do, has the outlier dims of all layers together, since outlier
features are the same ones in each layer (arXiv:2208.07339, section 4.1): those that are outliers at most positions first. Any other
module has the dims of its own input, those with most outliers first. A report names 64 dims of the hidden state at most, and 16 of
any other input. Columns are stored in multiples of eight, so that a set is filled up with the others of the lowest numbers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qcli.checkpoint.layout import Layout, Linear
from qcli.errors import CheckpointError, UsageError, together
from qcli.files.foreign_json import NUMBER, OBJECT, TEXT, Kind, Required, check, list_of, read_object, whole
from qcli.methods._method import Method
from qcli.methods.choosing import report_of
from qcli.schemes import COLUMNS_TOGETHER, OUTLIER_SHARE

ATTENTION_INPUT, FFN_INPUT = "attention input", "ffn input"
HIDDEN = (ATTENTION_INPUT, FFN_INPUT)  # kinds of inputs whose channels are the dimensions of the hidden state
HINT = "Make it with: qcli inspect-outliers MODEL --json > REPORT.json"
_OBJECTS = Required(list_of(OBJECT))
_REPORT: Mapping[str, Kind | Required] = {
    "model": Required(OBJECT),
    "threshold": Required(NUMBER),
    "layers": _OBJECTS,
    "features": _OBJECTS,
}
_MODEL = {"name": Required(TEXT), "architecture": Required(TEXT), "hidden_size": Required(whole(1))}
_LAYER = {"name": Required(TEXT), "sites": _OBJECTS}
_SITE = {"kind": Required(TEXT), "modules": Required(list_of(TEXT)), "channels": Required(whole(1)), "dims": _OBJECTS}
_DIM = {"dim": Required(whole())}


def read_report(path: Path) -> dict[str, Any]:
    """The report of inspect-outliers in a JSON file. Raises UsageError where it holds none."""
    try:
        report = read_object(path, f"the report {path}", HINT)
    except CheckpointError as e:
        raise UsageError(e.message, HINT) from e
    found = report.get("format")
    if found != "qcli-outliers":
        raise UsageError(f"{path} is no report of inspect-outliers: its format is {found!r}, expected 'qcli-outliers'", HINT)
    return report


@dataclass(frozen=True)
class _Input:
    """What linear modules of a block read: how wide it is, and its outlier dims, those to keep first in front."""

    channels: int
    dims: tuple[int, ...]


class ReportedColumns:
    """The columns that the report at `path` names. `inputs` by block and by path in the block, with `*` for an expert's number.
    Raises UsageError for a file that is no report, or a damaged one."""

    def __init__(self, path: str):
        self.path, report = path, read_report(Path(path))
        try:
            check(report, _REPORT, path, HINT)
            model = report["model"]
            check(model, _MODEL, f"{path}: model", HINT)
            self.name, self.architecture = model["name"], model["architecture"]
            self.threshold, hidden_size = float(report["threshold"]), model["hidden_size"]
            of_hidden_state = _dims(report["features"], hidden_size, f"{path}: features")
            self.inputs: dict[str, dict[str, _Input]] = {}
            for number, layer in enumerate(report["layers"]):
                check(layer, _LAYER, f"{path}: layer {number}", HINT)
                for site in layer["sites"]:
                    where = f"{path}: a site of {layer['name']}"
                    check(site, _SITE, where, HINT)
                    own = _dims(site["dims"], site["channels"], where)
                    hidden = site["kind"] in HIDDEN and site["channels"] == hidden_size
                    found = _Input(site["channels"], of_hidden_state if hidden else own)
                    self.inputs.setdefault(layer["name"], {}).update(dict.fromkeys(site["modules"], found))
        except CheckpointError as e:
            raise UsageError(e.message, e.hint) from e

    def of(self, module: str) -> _Input | None:
        """What is said of the input of `module`, by its full name."""
        block, path = self._place(module)
        return self.inputs.get(block, {}).get(path)

    def _place(self, module: str) -> tuple[str, str]:
        parts = module.split(".")
        prefixes = [".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
        block = next((prefix for prefix in prefixes if prefix in self.inputs), "")
        return block, re.sub(r"(?<=\.)\d+(?=\.)", "*", module[len(block) + 1 :] if block else module)

    def difference(self, linears: Sequence[Linear], config: Mapping[str, Any]) -> str | None:
        """What says that the report is of another model than that of these modules and this config; None where nothing does."""
        named = config.get("architectures")
        architectures = [each for each in named if isinstance(each, str)] if isinstance(named, list) else []
        such = linears[0].module if linears else "none"
        if architectures and _family(self.architecture) not in map(_family, architectures):
            return f"its architecture is {self.architecture}, expected {' or '.join(architectures)}"
        for block in self.inputs:
            if not any(linear.module.startswith(f"{block}.") for linear in linears):
                return f"it names the block {block}, expected blocks such as that of {such}"
        kinds = {_kind(f"{block}.{path}") for block, paths in self.inputs.items() for path in paths}
        for linear in linears:
            found = self.of(linear.module)
            if found is None and _kind(linear.module) in kinds:
                return f"it names no input of {linear.module}, expected one of {linear.in_features:,} channels"
            if found is not None and found.channels != linear.in_features:
                return f"it says that {linear.module} reads {found.channels:,} channels, expected {linear.in_features:,}"
        if not any(self.of(linear.module) for linear in linears):
            return f"it names none of the modules, expected some such as {such}"
        return None


def take_columns(
    chosen: dict[str, Method], layout: Layout, config: Mapping[str, Any], problems: list[str], notes: list[str]
) -> dict[str, tuple[int, ...]]:
    """The columns, ascending, that stay in 16 bits of each weight whose method names a report, by the tensor's name. `chosen` has
    the method of each weight, which gets the share of its columns. Raises UsageError for a file that is no report."""
    columns: dict[str, tuple[int, ...]] = {}
    for path in dict.fromkeys(report_of(method) for method in chosen.values()):
        if not path:
            continue
        report = ReportedColumns(path)
        found = [(layout.linear(tensor), method) for tensor, method in chosen.items() if report_of(method) == path]
        works = [(linear, method) for linear, method in found if linear is not None]
        if difference := report.difference(list(layout.linears.values()), config):
            problems.append(f"{path} is of another model, {report.name}: {difference}; make one of this model")
            continue
        inputs = {linear.tensor: report.of(linear.module) for linear, _ in works}
        if not any(found and found.dims for found in inputs.values()):
            problems.append(
                f"{path} names no outlier dim of any module: no value reached {report.threshold:g}; leave out outliers={path}"
            )
            continue
        narrow = []
        for linear, method in works:
            found = inputs[linear.tensor]
            share = method.scheme.outlier_share or OUTLIER_SHARE
            most = replace(method.scheme, outlier_share=share).outlier_columns(linear.in_features)
            kept = _filled(found.dims if found else (), most)
            chosen[linear.tensor] = replace(method, outlier_share=len(kept) / linear.in_features)  # type: ignore[type-var]
            if kept:
                columns[linear.tensor] = kept
            elif found and found.dims:
                narrow.append(linear.module)
        if narrow and len(narrow) == sum(bool(found and found.dims) for found in inputs.values()):
            problems.append("the outlier_share is fewer than 8 columns in every module; give a larger one by --set outlier_share")
        elif narrow:
            notes.append(together("modules keep no column in 16 bits, since the outlier_share is fewer than 8 of theirs", narrow))
        if unnamed := [linear.module for linear, _ in works if inputs[linear.tensor] is None]:
            notes.append(together(f"modules keep no column in 16 bits, since {path} does not name them", unnamed))
    return columns


def _filled(dims: Sequence[int], most: int) -> tuple[int, ...]:
    """The first `most` of `dims`, ascending, filled up to a multiple of COLUMNS_TOGETHER."""
    count = min(most, -(-len(dims) // COLUMNS_TOGETHER) * COLUMNS_TOGETHER)
    kept = set(dims[:count])
    others = (column for column in range(count) if column not in kept)
    return tuple(sorted(kept | {next(others) for _ in range(count - len(kept))}))


def _dims(found: Sequence[dict[str, Any]], channels: int, where: str) -> tuple[int, ...]:
    for each in found:
        check(each, _DIM, where, HINT)
        if each["dim"] >= channels:
            raise CheckpointError(f"{where}: dim {each['dim']:,} is named, expected 0 to {channels - 1:,}", HINT)
    return tuple(dict.fromkeys(each["dim"] for each in found))


def _family(architecture: str) -> str:
    """What classes of one architecture have in common: GPT2 of GPT2LMHeadModel and GPT2Model."""
    return re.split(r"For[A-Z]|LMHead|Model$", architecture)[0]


def _kind(module: str) -> str:
    return re.sub(r"\d+", "*", module)
