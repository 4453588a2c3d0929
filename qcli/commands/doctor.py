"""`qcli doctor`: shows what this machine has, what qcli will use, and how to add what is missing."""

from typing import Annotated

import typer

from qcli import console


def doctor(json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False) -> None:
    """Show what this machine has and what qcli will use of it."""
    from dataclasses import asdict

    from qcli.doctor import examine

    findings = examine()
    if json:
        console.json([asdict(finding) for finding in findings])
        return
    console.table("", ("part", "found"), [(finding.name, finding.value) for finding in findings], left=(0, 1))
    for finding in findings:
        if finding.advice:
            console.out(f"{finding.name}: {finding.advice}")
