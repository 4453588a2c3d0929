"""`qcli inspect-outliers`: where a model's outlier features are, what they do, and what each method would cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.commands import _cluster
from qcli.commands._cluster import Cluster, Workers
from qcli.commands._model import asked_model
from qcli.errors import UsageError
from qcli.process import importing


def inspect_outliers(
    model: Annotated[str | None, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help='A .txt file, or .jsonl: {"text": ...} or {"messages": [...]} in each line. Default: a text that comes with qcli.',
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of it to read. Default: up to 8,192.", show_default=False)] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's context, at most 2,048.", show_default=False)
    ] = None,
    threshold: Annotated[float, typer.Option(help="Magnitude of an outlier activation.")] = 6.0,
    ablate: Annotated[
        bool, typer.Option("--ablate", help="Also run the model without its outlier features: a second pass.")
    ] = False,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Look at the weights alone; run nothing.")] = False,
    dtype: Annotated[str, typer.Option(help="To compute in: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    cluster: Cluster = None,
    workers: Workers = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write a row for each site.", show_default=False)] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML page with charts.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a figure: .png, .svg or .pdf.", show_default=False)] = None,
) -> None:
    """Show where a model's outlier features are, what they do, and what each quantization method would cost."""
    model = asked_model(model, "qcli inspect-outliers HuggingFaceTB/SmolLM2-135M")
    _cluster.check(cluster, workers)
    if weights_only:
        running = {
            "--text": text,
            "--tokens": tokens,
            "--sequence-length": sequence_length,
            "--ablate": ablate,
            "--cluster": cluster,
            "--report": report,
            "--plot": plot,
        }
        for name, given in running.items():
            if given:
                raise UsageError(
                    f"{name} was given with --weights-only, which runs nothing: no text, no ablation, no charts",
                    f"Leave out {name}.",
                )
    _check_files(csv, report, plot)
    if weights_only:
        with importing():
            from qcli.commands import _weights_tables as tables
            from qcli.outliers.weights.inspect import inspect_weights
            from qcli.outliers.weights.summary import rows

        found = inspect_weights(model, revision=revision, trust_remote_code=trust_remote_code, progress=console.progress)
    else:
        with importing():
            from qcli.commands import _outlier_tables as tables
            from qcli.commands._outlier_tables import rows
            from qcli.outliers.inspect_outliers import inspect_outliers as measure

        found = measure(
            model,
            text=text,
            tokens=tokens,
            sequence_length=sequence_length,
            threshold=threshold,
            ablate=ablate,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
            cluster=cluster,
            workers=workers,
            progress=console.progress,
        )
    summary = found.summary()
    _write_files(summary, rows(found), csv, report, plot)
    console.json(summary) if json else tables.show(found)


def _check_files(csv: Path | None, report: Path | None, plot: Path | None) -> None:
    """Raises QcliError kinds, before any work, where a file could not be written at the end."""
    from qcli.files import whole as whole_file

    for path in (csv, report, plot):
        if path is not None:
            whole_file.check_place(path)
    if report is not None:
        from qcli.outliers import page

        page.check()
    if plot is not None:
        from qcli.files import figure as figure_file

        figure_file.check(plot)


def _write_files(
    summary: dict, cells: tuple[Sequence[str], list[list]], csv: Path | None, report: Path | None, plot: Path | None
) -> None:
    from qcli.files.whole import csv_bytes, write_whole

    if csv is not None:
        write_whole(csv, csv_bytes(*cells))
        console.say(f"wrote {csv}")
    if report is not None:
        from qcli.outliers.page import page

        write_whole(report, page(summary).encode())
        console.say(f"wrote {report}")
    if plot is not None:
        from qcli.outliers.figure import draw

        draw(summary, plot)
        console.say(f"wrote {plot}")
