"""Plans as JSON, for other machines."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcli import __version__, formats, methods
from qcli.calibration.settings import Calibration
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.source import Source, open_source
from qcli.errors import CheckpointError
from qcli.methods._method import Method
from qcli.methods.choosing import made
from qcli.quantization.plan import Output, Plan, Shard, Work
from qcli.recipe import Choice, recipe_of


def to_json(plan: Plan) -> dict[str, Any]:
    """All of a plan as JSON values, from which `from_json` makes the same plan on any machine that reaches the source."""
    work = [
        {
            "tensor": w.info.name,
            "file": w.info.file,
            "linear": None if w.linear is None else asdict(w.linear),
            "choice": None if w.method is None else _choice_of(w.method).summary(),
            "outputs": [asdict(o) for o in w.outputs],
            "columns": w.columns,
        }
        for w in plan.work
    ]
    source = plan.source
    return {
        "qcli": __version__,
        "source": {
            "label": source.label,
            "revision": source.revision,
            "stream": source.stream,
            "trust_remote_code": source.trusted,
            "fingerprint": source.fingerprint,
        },
        "recipe": plan.recipe.summary(),
        "format": plan.format.name,
        "decided_by": plan.decided_by,
        "output": str(plan.output),
        "dtype": plan.dtype,
        "compute_dtype": plan.compute_dtype,
        "quantization_config": plan.quantization_config,
        "work": work,
        "shards": [{"name": s.name, "header": s.header.decode("latin-1"), "size": s.size} for s in plan.shards],
        "notes": plan.notes,
        "problems": plan.problems,
        "calibration": None if plan.calibration is None else asdict(plan.calibration),
        "allow_nonfinite": plan.allow_nonfinite,
        "disk_bytes": plan.disk_bytes,
    }


def from_json(value: dict[str, Any], source: Source | None = None) -> Plan:
    """The plan that `to_json` wrote, its source opened again unless it is given.

    Raises CheckpointError where another qcli wrote it or the source is no longer what was planned for; HubError.
    """
    stated = value["source"]
    if value["qcli"] != __version__:
        raise CheckpointError(f"the plan is of qcli {value['qcli']}, and this is qcli {__version__}", "Plan with this version.")
    source = source or open_source(
        stated["label"], stated["revision"], stream=stated["stream"], trust_remote_code=stated["trust_remote_code"]
    )
    if source.fingerprint != stated["fingerprint"]:
        raise CheckpointError(f"{source.label} has changed since it was planned for", "Plan again.")
    if source.quantization and not source.scales:
        source.set_aside(formats.get("fp8").companions(source.tensors))
    work = []
    for index, w in enumerate(value["work"]):
        choice = w["choice"]
        work.append(
            Work(
                index,
                source.tensors[w["tensor"]],
                None if w["linear"] is None else Linear(**w["linear"]),
                None if choice is None else made(Choice(choice["method"], tuple(choice.get("options", {}).items()))),
                tuple(Output(**(o | {"shape": tuple(o["shape"])})) for o in w["outputs"]),
                tuple(w["columns"]),
            )
        )
    return Plan(
        source=source,
        recipe=recipe_of(value["recipe"], "the plan's recipe"),
        format=formats.get(value["format"]),
        decided_by=value["decided_by"],
        output=Path(value["output"]),
        dtype=value["dtype"],
        compute_dtype=value["compute_dtype"],
        quantization_config=value["quantization_config"],
        work=work,
        shards=[Shard(s["name"], s["header"].encode("latin-1"), s["size"]) for s in value["shards"]],
        notes=list(value["notes"]),
        problems=list(value["problems"]),
        calibration=None if value["calibration"] is None else Calibration(**value["calibration"]),
        allow_nonfinite=value["allow_nonfinite"],
        disk_bytes=value["disk_bytes"],
    )


def _choice_of(method: Method) -> Choice:
    return Choice(method.scheme.name, tuple(methods.options_of(method).items()))
