"""What a quantization cost: error of what was stored, sizes, time, memory."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from qcli import __version__
from qcli.checkpoint import dtypes
from qcli.cluster.jobs import WorkerSummary
from qcli.methods.errors import ErrorSums
from qcli.quantization.calibration_report import CalibrationReport
from qcli.quantization.plan import Plan


@dataclass
class ModuleError:
    """Measured error of one quantized weight, or of all of a kind."""

    name: str
    weights: int  # elements
    errors: ErrorSums

    @property
    def sqnr_text(self) -> str:
        """For a table."""
        return "exact" if self.errors.sqnr is None else f"{self.errors.sqnr:.1f} dB"

    def summary(self) -> dict[str, object]:
        """For JSON: rounded to what the measurement supports."""
        return {
            "name": self.name,
            "weights": self.weights,
            "relative_error": float(f"{self.errors.relative_error:.4g}"),
            "sqnr_db": None if self.errors.sqnr is None else round(self.errors.sqnr, 2),
        }


@dataclass
class Report:
    """What a finished run did. Sizes are bytes; `source_bytes` and `output_bytes` count the weights."""

    output: str
    method: str
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    quantized_modules: int
    kinds: list[ModuleError]
    worst: list[ModuleError]
    nonfinite: dict[str, int]
    seconds: float
    peak_memory: int
    warnings: list[str] = field(default_factory=list)
    url: str | None = None
    calibration: CalibrationReport | None = None
    workers: list[WorkerSummary] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {
            "bits_per_weight": round(self.bits_per_weight, 4),
            "seconds": round(self.seconds, 3),
            "kinds": [e.summary() for e in self.kinds],
            "worst": [e.summary() for e in self.worst],
            "calibration": None if self.calibration is None else self.calibration.summary(),
        }


def sum_up(plan: Plan, done: Mapping[int, ErrorSums]) -> tuple[list[ModuleError], list[ModuleError], dict[str, int]]:
    """Errors per module kind, the five modules with the largest relative error, and tensors with non-finite values."""
    modules = [ModuleError(w.linear.module, w.info.numel, replace(done[w.index], nonfinite=0)) for w in plan.quantized if w.linear]
    kinds: dict[str, ModuleError] = {}
    for module in modules:
        name = module.name.rsplit(".", 1)[-1]
        kind = kinds.setdefault(name, ModuleError(name, 0, ErrorSums()))
        kind.weights += module.weights
        kind.errors.squared_error += module.errors.squared_error
        kind.errors.squared_norm += module.errors.squared_norm
    worst = sorted(modules, key=lambda m: (-m.errors.relative_error, m.name))[:5]
    nonfinite = {plan.work[i].info.name: errors.nonfinite for i, errors in sorted(done.items()) if errors.nonfinite}
    return list(kinds.values()), worst, nonfinite


def provenance(
    plan: Plan, kinds: list[ModuleError], nonfinite: dict[str, int], calibration: CalibrationReport | None = None
) -> dict[str, object]:
    """qcli.json: what made this folder. No times and no paths, so that the same run gives the same bytes."""
    calibrated: dict[str, object] = {}
    if calibration:
        calibrated = {
            "calibration": {
                "text": calibration.text,
                "tokens": calibration.tokens,
                "sequence_length": calibration.sequence_length,
                "checked": asdict(calibration.checked) if calibration.checked else None,
            }
        }
    return {
        "qcli": __version__,
        "source": {
            "name": plan.source.label if plan.source.is_hub else plan.source.name,
            "revision": plan.source.revision,
            "fingerprint": plan.source.fingerprint,
        },
        "method": plan.method_name,
        "options": plan.options,
        "dtype": dtypes.TORCH_NAMES[plan.dtype],
        "compute_dtype": plan.compute_dtype,
        "modules_decided_by": plan.decided_by,
        "quantized_modules": len(plan.quantized),
        "bits_per_weight": round(plan.bits_per_weight, 4),
        "measured_error": [e.summary() for e in kinds],
        "nonfinite": nonfinite,
        **calibrated,
        "identity": json.loads(json.dumps(plan.identity)),
    }
