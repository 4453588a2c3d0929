"""`qcli evaluate`: perplexity, what differs from another model, and what each quantization method would cost."""

from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.commands import _cluster
from qcli.commands._cluster import Cluster, Workers
from qcli.commands._model import asked_model
from qcli.commands._settings import cache_dtype
from qcli.process import importing


def evaluate(
    model: Annotated[str | None, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)] = None,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Compare token by token with this model.", show_default=False)
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A LoRA adapter of MODEL, a folder or a hub id, to run with it.", show_default=False)
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Simulate quantization methods: all, or names with commas, also nf4-calibrated and the like.",
            show_default=False,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Dtype of the cache to compare with the model's: 8 (int8).", show_default=False)
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Bits of the output head, 8 or 4, to compare with 16.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help='A .txt file, or .jsonl: {"text": ...} or {"messages": [...]} in each line. Default: a text that comes with qcli.',
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of it to read. Default: up to 16,384.", show_default=False)] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens in a window. Default: the model's context, at most 2,048.", show_default=False)
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="New tokens in each window; fewer than its length overlap. Default: all.", show_default=False)
    ] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Also time prefill and decode, and measure memory.")] = False,
    dtype: Annotated[
        str, typer.Option(help="auto (the model's own; float32 with --methods), bfloat16, float16, float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    cluster: Cluster = None,
    workers: Workers = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the rows to this file.", show_default=False)] = None,
) -> None:
    """Measure a model on text: its perplexity, its distance from another model, and what each method would cost."""
    model = asked_model(model, "qcli evaluate HuggingFaceTB/SmolLM2-135M --methods all")
    _cluster.check(cluster, workers)
    with importing():
        from qcli.commands import _evaluation_tables as tables
        from qcli.evaluation.evaluate import evaluate as measure
    from qcli.files import whole as whole_file

    if csv is not None:
        whole_file.check_place(csv)
    result = measure(
        model,
        against=against,
        adapter=adapter,
        methods=methods,
        kv_dtype=cache_dtype(kv_dtype),
        head=head,
        text=text,
        tokens=tokens,
        sequence_length=sequence_length,
        stride=stride,
        speed=speed,
        dtype=dtype,
        device=device,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cluster=cluster,
        workers=workers,
        progress=console.progress,
    )
    if csv is not None:
        whole_file.write_whole(csv, whole_file.csv_bytes(*tables.rows(result)))
        console.say(f"wrote {csv}")
    console.json(result.summary()) if json else tables.show(result)
