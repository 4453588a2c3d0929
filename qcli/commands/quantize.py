"""`qcli quantize`: a checkpoint in, a quantized checkpoint out."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.commands import _cluster
from qcli.commands._cluster import Cluster, Workers
from qcli.commands._model import asked_model
from qcli.commands._settings import pairs
from qcli.errors import Interrupted

WORSE = 4  # the exit code where calibration made the result worse


def quantize(
    model: Annotated[str | None, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)] = None,
    bits: Annotated[int | None, typer.Option(help="4 for NF4, 8 for LLM.int8(). Default 4.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="Instead of --bits; `qcli methods` lists them.", show_default=False)] = None,
    format: Annotated[
        str | None,
        typer.Option(help="The format to write. Default: the widest-read one that holds the method.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The folder to make. Default ./NAME-METHOD.", show_default=False)
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option("--double-quant/--no-double-quant", help="4-bit: quantize absmax too. Default on.", show_default=False),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="4-bit: weights per absmax, 32 to 4096. Default 64.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="8-bit: magnitude of an outlier activation. Default 6.0.", show_default=False)
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="rtn, hqq: weights of a row per scale; -1 for a row.", show_default=False)
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="nf4, fp4, rtn: mse looks for the best scales, none takes the absmax. Default none.", show_default=False),
    ] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Let texts decide how weights are rounded.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="What to calibrate on: a text, or .jsonl. Default: a text that comes with qcli.", show_default=False),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Of the text. Default all of it, up to 262,144.", show_default=False)] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Measure a calibrated model on a part of the text that it has not seen.")
    ] = True,
    save_statistics: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep what the texts say of the model, to try other methods on it.", show_default=False),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Calibrate by what --save-statistics kept of the same texts.", show_default=False),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Modules to leave as they are, by full name. Repeatable.", show_default=False),
    ] = None,
    skip_from: Annotated[
        Path | None,
        typer.Option(metavar="REPORT.json", help="Leave what `inspect-outliers --json` recommends to leave.", show_default=False),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Which module gets what: a recipe, or a plan from --dry-run --json.", show_default=False),
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(help="Bits of the output head, and of an embedding tied to it: 16, 8 or 4. Default 16.", show_default=False),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(metavar="N", help="Plan for a server that divides the model over N GPUs.", show_default=False)
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of all that is not quantized: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Delete each downloaded shard once it is done.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers alone, and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder, at the very end.")] = False,
    cluster: Cluster = None,
    workers: Workers = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the result with a model card.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Rarer settings: max_shard_size=5GB, compute_dtype=auto, allow_nonfinite=false, modules=model.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Quantize a model into a folder that other libraries load."""
    model = asked_model(model, "qcli quantize HuggingFaceTB/SmolLM2-135M --bits 4")
    _cluster.check(cluster, workers)
    from qcli.commands import _quantize_tables as tables
    from qcli.quantization import quantize as quantization
    from qcli.recipe import read_recipe

    skipped = list(skip or ())
    if skip_from is not None:
        from qcli.outliers.recommend import read_skip

        found = read_skip(skip_from)
        if not found:
            console.warn(f"{skip_from} recommends to leave no module as it is")
        skipped += found
    plan = quantization.make_plan(
        model,
        output,
        bits=bits,
        method=method,
        double_quant=double_quant,
        block_size=block_size,
        threshold=threshold,
        group_size=group_size,
        search=search,
        format=format,
        tensor_parallel=tensor_parallel,
        skip=skipped,
        recipe=read_recipe(recipe) if recipe else None,
        head=head,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        stream=stream,
        overwrite=overwrite,
        calibrate=calibrate,
        text=text,
        tokens=tokens,
        check=check,
        statistics=statistics,
        save_statistics=save_statistics,
        settings=pairs(set_),
        on_cluster=cluster is not None,
        upload=push_to_hub is not None,
    )
    if dry_run and cluster is not None:
        from qcli.quantization.division import summary

        plan.notes.append(f"on a cluster: {summary(plan, workers)}")
    if dry_run:
        console.json(tables.plan_summary(plan)) if json else tables.show_plan(plan)
        plan.check()
        return
    for note in plan.notes:
        console.warn(note)
    if not plan.problems and cluster is None:
        plan.source.read_ahead()
    try:
        report = quantization.run_plan(
            plan,
            device=device,
            overwrite=overwrite,
            push_to_hub=push_to_hub,
            cluster=cluster,
            workers=workers,
            progress=console.progress,
        )
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; finished work is kept in {plan.output}.partial", f"Go on with: {shlex.join(['qcli', *sys.argv[1:]])}"
        ) from None
    for warning in report.warnings:
        console.warn(warning)
    console.json(report.summary()) if json else tables.show_report(report)
    if report.calibration and report.calibration.checked and report.calibration.checked.is_worse:
        raise typer.Exit(WORSE)
