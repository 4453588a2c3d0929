"""`qcli dequantize`: a quantized checkpoint in, the same model in 16 or 32 bits out."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.commands._model import asked_model
from qcli.errors import Interrupted


def dequantize(
    model: Annotated[str | None, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to make. Default ./NAME-dequantized.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of all weights: auto (the config's), bfloat16, float16, float32.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder, at the very end.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a line.")] = False,
) -> None:
    """Turn a quantized model back into a plain checkpoint, each weight as its format decodes."""
    model = asked_model(model, "qcli dequantize SmolLM2-135M-nf4")
    from qcli.quantization.dequantize import dequantize as run
    from qcli.sizes import format_bytes

    try:
        made = run(
            model,
            output,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            overwrite=overwrite,
            progress=console.progress,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; finished work is kept in the folder's .partial", f"Go on with: {shlex.join(['qcli', *sys.argv[1:]])}"
        ) from None
    if json:
        console.json(made.summary())
        return
    console.out(
        f"{made.output}: {made.modules:,} modules decoded to {made.dtype}, {format_bytes(made.source_bytes)} to "
        f"{format_bytes(made.output_bytes)} in {made.seconds:.1f} s, peak memory {format_bytes(made.peak_memory)}"
    )
