"""The options of commands whose work a cluster can do."""

from typing import Annotated

import typer

Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS", help="Let a Ray cluster do the work: HOST:PORT, auto, or local to start one here.", show_default=False
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="With --cluster: how many. Default one a machine.", show_default=False)]


def check(cluster: str | None, workers: int | None) -> None:
    """Raises UsageError for workers without a cluster."""
    from qcli.errors import UsageError

    if workers is not None and cluster is None:
        raise UsageError("--workers was given without --cluster", "Add --cluster local, auto or HOST:PORT.")
