"""`qcli estimate-memory`: what a model needs and whether it fits, or, without a model, what fits a GPU."""

from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.errors import UsageError

DOES_NOT_FIT = 3  # the exit code
_EXAMPLE = "qcli estimate-memory --params 8B --gpu 24GB"


def estimate_memory(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A config.json, a folder, or a model id on the hub. Without one, --gpu shows what fits it.", show_default=False
        ),
    ] = None,
    params: Annotated[
        str | None, typer.Option(metavar="7B", help="In place of a model: one like Llama of this size.", show_default=False)
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            "--gpu",
            "--gpus",
            metavar="GPU",
            help="24GB (1e9), 24GiB (2^30), rtx4090, 8xa100-80, or auto for those of this machine. Repeatable.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer. Default: the model's limit, at most 8,192.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    bits: Annotated[
        list[str] | None, typer.Option(help="32, 16, 8, 4, nf4, nf4-plain, fp4, llm-int8... Repeatable.", show_default=False)
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the cache: int8, fp8, q8_0, q4_0... Default: the model's.", show_default=False)
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Bits of a quantized model's output head: 16, 8 or 4. Default 16.", show_default=False)
    ] = None,
    runtime: Annotated[str, typer.Option(help="What runs the model: transformers or vllm.")] = "transformers",
    train: Annotated[
        str | None,
        typer.Option(help="Train adapters instead: finetune (as qcli does), qlora or lora (as PEFT does).", show_default=False),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters that are trained.")] = 16,
    quantizing: Annotated[
        bool, typer.Option("--quantizing", help="Also show what `qcli quantize` would take on this machine.")
    ] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Show the table of the LLM.int8() paper: hardware, and the largest model that it runs.")
    ] = False,
    models: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="With --table: these models, not the paper's. Repeatable.", show_default=False),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the formula behind each figure.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the bars: .png, .svg or .pdf.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Estimate what memory a model needs, before a byte of it is downloaded. Exit code 0: it fits. 3: it does not."""
    from qcli.commands import _memory_tables as tables

    if table:
        if model is not None or params is not None:
            raise UsageError("--table was given with a model", "Name models with --models, or leave out --table.")
        others = {
            "bits": bits,
            "context": context,
            "head": head,
            "train": train,
            "quantizing": quantizing,
            "explain": explain,
            "plot": plot,
        }
        for name in (name for name, value in others.items() if value not in (None, False, [])):
            raise UsageError(f"--{name} was given with --table", f"Leave out --{name}, or name one model without --table.")
        _table(models or [], gpu or [], json)
        return
    if models:
        raise UsageError("--models was given without --table", "Add --table, or name one model as the argument.")
    if model is None and params is None:
        if not gpu:
            raise UsageError("neither a model nor a GPU was given", f"For example: {_EXAMPLE}")
        others = {"head": head, "train": train, "quantizing": quantizing, "explain": explain, "plot": plot, "revision": revision}
        for name in (name for name, value in others.items() if value):
            raise UsageError(f"--{name} was given without a model", f"Name one, or leave out --{name}. For example: {_EXAMPLE}")
        asked = {"context": context, "batch": batch, "bits": bits or [], "kv_dtype": kv_dtype, "runtime": runtime}
        _what_fits(gpu, asked, json)
        return
    from qcli.files import figure as figure_file
    from qcli.memory.costs.quantizing import quantizing as quantizing_of
    from qcli.memory.costs.quantizing import refusals
    from qcli.memory.estimate import estimate_memory as estimate
    from qcli.memory.shown import figure
    from qcli.memory.shown.summary import summary

    if plot is not None:
        figure_file.check(plot)
    found = estimate(
        model,
        params=params,
        gpu=gpu or [],
        context=context,
        batch=batch,
        bits=bits or [],
        kv_dtype=kv_dtype,
        head=head,
        runtime=runtime,
        train=train,
        rank=rank,
        revision=revision,
    )
    runs = quantizing_of(found.model, Path.cwd()) if quantizing else []
    if json:
        console.json(summary(found) | ({"quantizing": [vars(run) for run in runs]} if quantizing else {}))
    else:
        tables.show(found, explain=explain)
        tables.show_quantizing(runs)
    if quantizing:
        for reason in refusals(found.model):
            console.say(f"note: {reason}")
    if plot is not None:
        figure.draw(found, plot)
        console.say(f"wrote {plot}")
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _what_fits(gpu: list[str], asked: dict, json: bool) -> None:
    from qcli.commands import _memory_tables as tables
    from qcli.memory.what_fits import summary, what_fits

    found = what_fits(gpu, **asked)
    if json:
        console.json(summary(found))
    else:
        tables.show_what_fits(found)
    if not found.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _table(models: list[str], gpus: list[str], json: bool) -> None:
    from qcli.commands import _memory_tables as tables
    from qcli.memory import paper_table
    from qcli.memory.model.opening import open_model
    from qcli.memory.placing.hardware import gpus as devices

    named = [name.strip() for text in models for name in text.split(",")]
    candidates = [open_model(name) for name in named] if named else paper_table.paper_models()
    hardware = paper_table.paper_hardware()
    rule = paper_table.PAPER_RULE
    if gpus:
        hardware = [paper_table.Hardware("", text, tuple(devices([text]))) for text in gpus]
        rule = paper_table.RULE
    rows = paper_table.table(candidates, hardware)
    if json:
        console.json({"rule": rule, "rows": [paper_table.summary(row) for row in rows]})
    else:
        tables.show_table(rows, rule)
