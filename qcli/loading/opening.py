"""What is checked of a model and of the options before torch and transformers are loaded, which takes seconds."""

import warnings
from collections.abc import Iterable, Mapping

from qcli import formats
from qcli.checkpoint.source import Source, open_source
from qcli.errors import CheckpointError, QcliWarning, UsageError
from qcli.files.foreign_json import TEXT, check
from qcli.methods.choosing import methods_of, needs_of, recipe_in_force, report_of
from qcli.recipe import Recipe


def open_checkpoint(model: str, revision: str | None, trust_remote_code: bool) -> Source:
    """The checkpoint of a folder or hub id, whole as far as headers show, and unquantized or in a format that qcli runs.

    Warns of what is odd about it. Raises CheckpointError, HubError.
    """
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    if source.problems:
        raise CheckpointError(f"{model}: {source.problems[0]}", source.again())
    for note in source.notes:
        warnings.warn(f"{model}: {note}", QcliWarning, stacklevel=2)
    if source.quantization:
        label = f"{model}/config.json: quantization_config"
        check(source.quantization, {"quant_method": TEXT}, label, "Mend the file, or fetch it again.")
        format = formats.of_config(source.quantization)
        if format is None:
            raise CheckpointError(
                f"{model} is quantized by {source.quantization['quant_method']}, which qcli does not run; it runs "
                f"{', '.join((*formats.NAMES, *formats.READ_ONLY))}",
                "Load it with transformers.",
            )
        format.check(source.quantization, label)
    return source


def asked_recipe(
    recipe: Recipe | None,
    bits: int | None,
    method: str | None,
    options: Mapping[str, object],
    skip: Iterable[str],
    settings: Mapping[str, object],
    head: int | None = None,
) -> Recipe | None:
    """The recipe that a model is to be quantized by while it is read; None where nothing asks for one. Raises UsageError."""
    skip = list(skip)
    if bits is None and method is None and recipe is None:
        asked = {**options, "skip": skip or None, "set": settings or None, "head": head}
        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise UsageError(f"--{given[0].replace('_', '-')} was given without --bits, --method or --recipe", "Add one of them.")
        return None
    found, _ = recipe_in_force(recipe, bits, method, options, skip, None, settings, head=head)
    if any(needs_of(each) == "tokens" for each in methods_of(found)):
        raise UsageError(
            "outlier_share: texts choose the columns, and none are read while a model is loaded",
            "Leave it out, or run qcli quantize --calibrate first.",
        )
    if any(report_of(each) for each in methods_of(found)):
        raise UsageError(
            "outliers: the columns that a report names are stored beside the codes, and none are while a model is loaded",
            "Leave it out, or run qcli quantize with it first.",
        )
    if method := next((each.scheme.name for each in methods_of(found) if needs_of(each) == "fisher"), None):
        raise UsageError(
            f"{method}: its tables follow from gradients of texts, and none are read while a model is loaded",
            f"Run qcli quantize --method {method} first, or take kmeans, whose tables follow from the weights alone.",
        )
    formats.holding([each.scheme for each in methods_of(found)], found.format)  # raises for what no format holds
    return found
