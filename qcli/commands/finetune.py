"""`qcli finetune`: trains adapters on a frozen model, or weights of a model that is to run in LLM.int8()."""

from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.commands._model import asked_model
from qcli.commands._settings import pairs
from qcli.errors import UsageError
from qcli.process import importing


def finetune(
    model: Annotated[str | None, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)] = None,
    data: Annotated[
        Path | None, typer.Argument(help="A .jsonl or .txt file, or a folder with train.jsonl and valid.jsonl.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The adapter's folder. Default ./NAME-adapter; of weights ./NAME-finetuned.", show_default=False
        ),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Quantize an unquantized model while reading it: 4 or 8.", show_default=False)
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    alpha: Annotated[float, typer.Option(help="Adapters count alpha / rank.")] = 32.0,
    target: Annotated[str, typer.Option(metavar="NAMES", help="Modules with adapters, such as q_proj,v_proj.")] = "all-linear",
    epochs: Annotated[
        float | None,
        typer.Option(help="Times that all rows are read. Default 3 for fewer than 10,000 examples, else 1.", show_default=False),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training, instead of --epochs.", show_default=False)] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-4,
    batch: Annotated[int, typer.Option(help="Rows in a step.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a row, at most.")] = 2048,
    too_long: Annotated[
        str | None,
        typer.Option(
            metavar="error|cut|split|drop",
            help="What becomes of longer rows. Default: texts are split, else error.",
            show_default=False,
        ),
    ] = None,
    eval: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SHARE",
            help="Rows to measure on, which are not trained on. Default 0.05, at most 500.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapters, the order of rows, and what is held out.")] = 0,
    dtype: Annotated[str, typer.Option(help="What is computed in: auto (the model's), bfloat16, float16, float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, from headers and data alone, and stop.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder, at the very end.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the losses: .png, .svg or .pdf.", show_default=False)
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Rarer settings, such as dropout=0.05, rslora=true, schedule=constant, loss=all, train=weights.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Train low-rank adapters on a frozen model, quantized or not: LoRA and QLoRA. Or its weights, for LLM.int8()."""
    example = "qcli finetune SmolLM2-135M-nf4 train.jsonl"
    model = asked_model(model, example)
    if data is None:
        raise UsageError("no data was given, expected a .jsonl or .txt file, or a folder", f"Such as: {example}")
    from qcli.files import figure

    if plot is not None:
        figure.check(plot)
    with importing():
        from qcli.commands import _finetune_tables as tables
        from qcli.finetuning.finetune import planned, train

    plan = planned(
        model,
        data,
        output,
        rank=rank,
        alpha=alpha,
        target=target,
        epochs=epochs,
        steps=steps,
        lr=lr,
        batch=batch,
        max_tokens=max_tokens,
        too_long=too_long,
        held_out=eval,
        seed=seed,
        bits=bits,
        settings=pairs(set_),
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        overwrite=overwrite,
    )
    if dry_run and json:
        console.json(plan.summary())
    elif not json and tables.speaks():
        tables.show_plan(plan, talk=not dry_run)
    if dry_run:
        plan.check()
        return
    result = train(plan, overwrite=overwrite, progress=console.token_progress)
    if not tables.speaks():
        return
    if plot is not None:
        tables.draw(result, plot)
        console.say(f"wrote {plot}")
    console.json(result.summary()) if json else tables.show_result(result)
