"""`qcli info`: shows the content of a checkpoint, from its headers."""

from typing import Annotated

import typer

from qcli import console
from qcli.commands._model import asked_model
from qcli.errors import PlanError

_LONGEST = 200  # characters of a field of the config that are shown


def info(
    model: Annotated[str | None, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show architecture, sizes and quantization of a model, and whether its files are whole."""
    model = asked_model(model, "qcli info HuggingFaceTB/SmolLM2-135M")
    from dataclasses import asdict

    from qcli.checkpoint.source import open_source
    from qcli.formats.describe import describe
    from qcli.sizes import format_bytes

    source = open_source(model, revision)
    found = describe(source)
    if not json:
        for note in found.notes:
            console.warn(note)
    if json:
        console.json(asdict(found) | {"bits_per_weight": round(found.bits_per_weight, 4), "whole": not found.problems})
    else:
        console.out(f"{found.name}: {found.architecture}" + (f" at {found.revision}" if found.revision else ""))
        console.out(
            f"{found.parameters:,} parameters, {format_bytes(found.bytes)} in {found.files} file(s), "
            f"{found.bits_per_weight:.3f} bits per weight"
        )
        rows = [(p.kind, p.scheme, p.tensors, f"{p.parameters:,}", f"{p.bytes:,}") for p in found.parts]
        console.table("", ("module kind", "stored as", "tensors", "parameters", "bytes"), rows, left=(0, 1))
        for name, value in (found.quantization_config or {}).items():
            short = value if len(str(value)) <= _LONGEST else f"{len(value)} entries, in config.json"
            console.out(f"{name}: {short}")
        if not found.problems:
            console.out("files: whole by their headers")
    if found.problems:
        raise PlanError(model, found.problems, source.again())
