"""The files of a finished folder besides the weights: index, config, tokenizer, provenance, model card."""

import json

from qcli.checkpoint import dtypes
from qcli.checkpoint.carried import has_tokenizer
from qcli.checkpoint.config_json import live_auto_map
from qcli.errors import CheckpointError
from qcli.files.foreign_json import parse_object
from qcli.quantization.calibration_report import CalibrationReport
from qcli.quantization.plan import Plan
from qcli.quantization.report import ModuleError, provenance
from qcli.quantization.staging import Staging
from qcli.sizes import format_bytes

_AUTO_MAP = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def carry_over(plan: Plan, staging: Staging) -> None:
    """Copies what goes along as it is, before any weight is read: what cannot be read or written is found then.

    Raises CheckpointError, HubError.
    """
    for name in plan.source.carried.files:
        data = plan.source.carried_bytes(name)
        if name in _AUTO_MAP:
            data = _without_dangling_code(plan, name, data)
        staging.add_file(name, data)


def _without_dangling_code(plan: Plan, name: str, data: bytes) -> bytes:
    """The file, without an auto_map whose code is not there: every loader would stop at it."""
    try:
        value = parse_object(data, name, "")
    except CheckpointError:
        return data  # carried as it is: no weight depends on it
    kept = live_auto_map(value.get("auto_map"), plan.source.carried.files)
    if kept == value.get("auto_map"):
        return data
    value = {key: kept if key == "auto_map" else field for key, field in value.items() if key != "auto_map" or kept}
    return as_json(value)


def write_rest(
    plan: Plan, staging: Staging, kinds: list[ModuleError], nonfinite: dict[str, int], calibration: CalibrationReport | None = None
) -> list[str]:
    """Writes everything but the weights and what is carried over; config.json is the last. Returns warnings for the user."""
    warnings = []
    if plan.index is not None:
        staging.add_file("model.safetensors.index.json", plan.index)
    if not has_tokenizer(plan.source.carried.files):
        warnings.append(f"{plan.source.label} has no tokenizer: the output has none either")
    made = provenance(plan, kinds, nonfinite, calibration)
    staging.add_file("qcli.json", as_json(made))
    staging.add_file("README.md", model_card(plan, kinds, calibration).encode())
    staging.add_file("config.json", as_json(plan.config))
    return warnings


def as_json(value: object) -> bytes:
    """A JSON file for people."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, kinds: list[ModuleError], calibration: CalibrationReport | None) -> str:
    """README.md of the output: base model, method, options, sizes and measured error."""
    source, name = plan.source, plan.method_name
    own = plan.format.name == "qcli"
    front = [
        "---",
        f"library_name: {'qcli' if own else 'transformers'}",
        "tags:",
        *(f"- {each}" for each in dict.fromkeys(("qcli", plan.format.name, *plan.schemes))),
    ]
    if source.is_hub:
        front += [f"base_model: {source.label}", "base_model_relation: quantized"]
    options = ", ".join(f"{k} {json.dumps(v)}" for k, v in plan.options.items())
    readers = f"transformers loads it with {plan.format.library} installed; `qcli generate` runs it without."
    if own:
        readers = "`qcli generate` runs it. Its format is qcli's own."
    revision = f" at revision `{source.revision}`" if source.revision else ""
    lines = [
        *front,
        "---",
        "",
        f"# {source.name}, {name}",
        "",
        f"`{source.label if source.is_hub else source.name}`{revision}, quantized with qcli. {readers}",
        "",
        "| | |",
        "|---|---|",
        f"| method | {name} ({options}) |",
        f"| quantized modules | {len(plan.quantized)}, chosen by {plan.decided_by} |",
        f"| other tensors | {dtypes.TORCH_NAMES[plan.dtype]}; computes in {plan.compute_dtype} |",
        f"| weights before | {format_bytes(plan.source_bytes)} |",
        f"| weights after | {format_bytes(plan.output_bytes)}, {plan.bits_per_weight:.3f} bits per weight |",
        "",
        "Measured error of the stored weights against the originals:",
        "",
        "| module kind | weights | relative error | SQNR |",
        "|---|---:|---:|---:|",
    ]
    for kind in kinds:
        lines.append(f"| {kind.name} | {kind.weights:,} | {kind.errors.relative_error:.3%} | {kind.sqnr_text} |")
    if calibration:
        lines += ["", f"Calibrated on {calibration.tokens:,} tokens of {calibration.text}."]
    if calibration and (found := calibration.checked):
        lines[-1] += (
            f" On {found.tokens:,} other tokens of it: KL divergence from the original {found.kl:.5f} nats a token, without "
            f"calibration {found.plain_kl:.5f}; perplexity {found.perplexity:.3f}, of the original {found.source_perplexity:.3f}."
        )
    return "\n".join(lines) + "\n"
