"""Where the base of an adapter is, what a quantized base was made from, and a base as training read it."""

import json
import warnings
from pathlib import Path

from qcli.checkpoint.source import Source, open_source
from qcli.errors import CheckpointError, HubError, QcliWarning
from qcli.files.foreign_json import OBJECT, TEXT, Kind, Required, check, read_object
from qcli.loading.adapter import Adapter
from qcli.progress import Progress
from qcli.quantization.quantize import make_plan, run_plan
from qcli.recipe import Recipe

_MADE_FROM: dict[str, Kind | Required] = {"name": Required(TEXT), "revision": TEXT, "fingerprint": Required(TEXT)}


def base_of(adapter: Adapter, asked: str | None, trust_remote_code: bool) -> Source:
    """The checkpoint that `adapter` was trained on, or the one `asked` for. Warns of another one that was asked for."""
    if asked is not None:
        source = open_source(asked, trust_remote_code=trust_remote_code)
        if (other := adapter.other_base(source)) is not None:
            warnings.warn(other, QcliWarning, stacklevel=3)
        return source
    if adapter.base_model is None:
        raise CheckpointError(f"{adapter.label} names no base model", "Say which it is: --base MODEL.")
    is_here = Path(adapter.base_model).is_dir()
    try:
        source = open_source(adapter.base_model, None if is_here else adapter.revision, trust_remote_code=trust_remote_code)
    except (CheckpointError, HubError) as e:
        raise CheckpointError(
            f"the base of {adapter.label}, {adapter.base_model}, cannot be opened: {e.message}", "Say where it is: --base MODEL."
        ) from e
    if (other := adapter.other_base(source)) is not None:
        raise CheckpointError(other, f"Find the base that it was trained on; to merge into this one: --base {adapter.base_model}")
    return source


def original_of(base: Source, asked: str | None) -> Source:
    """What a quantized base was made from, by its qcli.json: a hub id, or a folder beside it."""
    label, hint = f"{base.label}/qcli.json", "Pass the original as --base MODEL, or leave out --onto original."
    if "qcli.json" not in base.place.names:
        raise CheckpointError(f"{base.label} has no qcli.json, which would name the model that it was made from", hint)
    made = read_object(base.place.local("qcli.json"), label, hint)
    check(made, {"source": Required(OBJECT)}, label, hint)
    check(made["source"], _MADE_FROM, f"{label}: source", hint)
    name, revision = made["source"]["name"], made["source"].get("revision")
    found = name
    if revision is None:
        beside = base.config_folder.resolve().parent / name
        if not beside.is_dir():
            raise CheckpointError(f"{base.label} was made from the folder {name}, and there is none of that name beside it", hint)
        found = str(beside)
    original = open_source(found, revision, trust_remote_code=base.trusted)
    if original.fingerprint != made["source"]["fingerprint"]:
        raise CheckpointError(f"{found} is not the checkpoint that {base.label} was made from: it has changed", hint)
    return original


def quantized_as_read(base: Source, recipe: Recipe, folder: Path, progress: Progress | None) -> Source:
    """The unquantized `base` in `folder`, quantized by `recipe` as `load` does while it reads. What an earlier call has made of the
    same is taken. Raises PlanError, CheckpointError, HubError, NonFiniteError."""
    revision = base.revision if base.is_hub else None
    plan = make_plan(base.label, folder, recipe=recipe, revision=revision, trust_remote_code=base.trusted, overwrite=True)
    made = folder / "qcli.json"
    found = read_object(made, str(made), "Delete the folder.").get("identity") if made.exists() else None
    if found != json.loads(json.dumps(plan.identity)):
        run_plan(plan, device="cpu", overwrite=True, progress=progress)
    return open_source(str(folder), trust_remote_code=base.trusted)
