"""The files of a finished folder besides the weights: index, config, tokenizer, provenance, model card."""

import json

from qcli.checkpoint import dtypes
from qcli.checkpoint.plan import Plan
from qcli.checkpoint.staging import Staging
from qcli.report import ModuleError, provenance
from qcli.sizes import format_bytes

_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def write_rest(plan: Plan, staging: Staging, kinds: list[ModuleError], nonfinite: dict[str, int]) -> list[str]:
    """Writes everything but the weights; config.json is the last. Returns warnings for the user."""
    warnings = []
    if plan.index is not None:
        staging.add_file("model.safetensors.index.json", plan.index)
    carried = list(plan.source.extra_files)
    for name in carried:
        staging.add_file(name, plan.source.extra_path(name).read_bytes())
    if not any(name.endswith(_TOKENIZER) or name.endswith(".tiktoken") for name in carried):
        warnings.append(f"{plan.source.label} has no tokenizer: the output has none either")
    made = provenance(plan, kinds, nonfinite)
    staging.add_file("qcli.json", _json(made))
    staging.add_file("README.md", model_card(plan, kinds).encode())
    staging.add_file("config.json", _json(plan.config))
    return warnings


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def model_card(plan: Plan, kinds: list[ModuleError]) -> str:
    """README.md of the output: base model, method, options, sizes and measured error."""
    source, method = plan.source, plan.method
    front = ["---", "library_name: transformers", "tags:", "- qcli", "- bitsandbytes", f"- {method.name}"]
    if source.is_hub:
        front += [f"base_model: {source.label}", "base_model_relation: quantized"]
    options = ", ".join(f"{k} {json.dumps(v)}" for k, v in vars(method).items())
    revision = f" at revision `{source.revision}`" if source.revision else ""
    lines = [
        *front,
        "---",
        "",
        f"# {source.name}, {method.name}",
        "",
        f"`{source.label if source.is_hub else source.name}`{revision}, quantized with qcli. transformers loads it with "
        "bitsandbytes installed; `qcli generate` runs it without.",
        "",
        "| | |",
        "|---|---|",
        f"| method | {method.name} ({options}) |",
        f"| quantized modules | {len(plan.quantized)}, chosen by {plan.layout.decided_by} |",
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
        lines.append(f"| {kind.name} | {kind.weights:,} | {kind.relative_error:.3%} | {kind.sqnr_text} |")
    return "\n".join(lines) + "\n"
