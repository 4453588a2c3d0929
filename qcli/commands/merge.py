"""`qcli merge`: a LoRA adapter and its base become one model."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.commands._model import asked_model
from qcli.errors import Interrupted
from qcli.process import importing


def merge(
    adapter: Annotated[str | None, typer.Argument(help="A LoRA adapter: a folder or a hub id.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to make. Default ./NAME-merged.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Where the base is, if not where the adapter says; may be another.", show_default=False),
    ] = None,
    onto: Annotated[
        str, typer.Option(help="Of a quantized base: quantized (what it decodes to), or original (what it was made from).")
    ] = "quantized",
    bits: Annotated[int, typer.Option(help="Of the result: 16, or 8 or 4 by qcli quantize.")] = 16,
    text: Annotated[
        Path | None,
        typer.Option(help="Held-out text, .txt or .jsonl, whose loss is measured before and after.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder, at the very end.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> None:
    """Merge a LoRA adapter into its base: a model that needs no adapter, in 16, 8 or 4 bits."""
    adapter = asked_model(adapter, "qcli merge my-adapter")
    with importing():
        from qcli.quantization.merge import merge as run
    from qcli.sizes import format_bytes

    try:
        made = run(
            adapter,
            output,
            base=base,
            onto=onto,
            bits=bits,
            text=text,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=console.progress,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; finished work is kept in folders beside the output", f"Go on with: {shlex.join(['qcli', *sys.argv[1:]])}"
        ) from None
    if json:
        console.json(made.summary())
        return
    console.out(
        f"{made.output}: {made.modules:,} modules of {made.base} merged with {made.adapter}, weights changed by "
        f"{made.relative_change:.2%}; {made.dtype}, {format_bytes(made.source_bytes)} to {format_bytes(made.output_bytes)} in "
        f"{made.seconds:.1f} s, peak memory {format_bytes(made.peak_memory)}"
    )
    if made.losses:
        console.out(
            f"loss on {text}: {made.losses['adapter']:.4f} of the base with the adapter, {made.losses['merged']:.4f} of the result"
        )
