"""What each method costs: bits of a weight, KL to the unquantized model and perplexity, on the demo model and others, in one run.

    python benchmarks/methods.py [MODEL ...] [--tokens N] [--methods NAMES]

Writes qcli/methods/measured.json, which `qcli methods` shows, and benchmarks/results/methods.json. A MODEL is a folder; texts are
the bundled ones. With two cores and SmolLM2-135M it takes some ten minutes. With --methods these alone are measured, and added to
what is saved.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import qcli  # noqa: E402
from benchmarks.measure import machine  # noqa: E402
from qcli.errors import PlanError  # noqa: E402

# Options that change what a method costs, beside the methods with their own.
FORMS = {
    "nf4 --search mse": ("nf4", {"search": "mse"}),
    "fp4 --search mse": ("fp4", {"search": "mse"}),
    "rtn --search mse": ("rtn", {"search": "mse"}),
    "rtn --group-size 64": ("rtn", {"group_size": 64}),
    "rtn --group-size 64 --search mse": ("rtn", {"group_size": 64, "search": "mse"}),
    "rtn --group-size 64, zero points, --search mse": ("rtn", {"group_size": 64, "search": "mse", "zero_point": True}),
    "rtn --bits 3 --group-size 64 --search mse": ("rtn", {"bits": 3, "group_size": 64, "search": "mse"}),
    "rtn --bits 8 --group-size 64": ("rtn", {"bits": 8, "group_size": 64}),
    "hqq --bits 3": ("hqq", {"bits": 3}),
    "fp8, blocks": ("fp8", {"share": "block"}),
    "fp8, weights alone": ("fp8", {"activations": False}),
    "nvfp4, activations too": ("nvfp4", {"activations": True}),
}


def measure(model: str, tokens: int, methods: str) -> dict[str, dict[str, float]]:
    """Costs by method, simulated; of all methods also by the forms above, as checkpoints."""
    rows = {row.name: row for row in qcli.evaluate(model, methods=methods, tokens=tokens).rows}
    for name, (method, settings) in FORMS.items() if methods == "all" else ():
        with tempfile.TemporaryDirectory() as folder:
            try:
                qcli.quantize(model, f"{folder}/out", method=method, settings=settings)
            except PlanError as e:
                print(f"{model}: {name} is left out: {e.problems[0]}", file=sys.stderr)
                continue
            rows[name] = qcli.evaluate(f"{folder}/out", against=model, tokens=tokens, dtype="float32").rows[-1]
    return {name: _costs(row) for name, row in rows.items() if row.against is not None}


def _costs(row) -> dict[str, float]:
    kl, perplexity = row.against.divergence.mean.value, row.quality.perplexity.value
    return {"bits": round(row.bits_per_weight, 3), "kl": float(f"{kl:.4g}"), "perplexity": float(f"{perplexity:.5g}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--methods", default="all", help="names with commas between them; added to what is saved")
    args = parser.parse_args()
    models = {"demo": str(ROOT / "examples" / "demo-model")} | {Path(m).name: m for m in args.models}
    found = {name: measure(path, args.tokens, args.methods) for name, path in models.items()}
    about = f"KL in nats to the unquantized model in float32, bits of the linear layers, on {args.tokens:,} tokens of bundled text."
    saved, measured_on = ROOT / "benchmarks/results/methods.json", machine()
    if args.methods != "all":
        before = json.loads(saved.read_text())
        if before["about"] != about:
            raise SystemExit(f"{saved.name} says {before['about']!r}, expected {about!r}; measure all methods again")
        measured_on = before["machine"]  # most of it
        found = {name: before["models"].get(name, {}) | found.get(name, {}) for name in (*before["models"], *found)}
    package = {"about": about, "models": {name: {k: v for k, v in of.items() if k not in FORMS} for name, of in found.items()}}
    (ROOT / "qcli/methods/measured.json").write_text(json.dumps(package, indent=1) + "\n")
    result = {"machine": measured_on, "about": about, "models": found}
    saved.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
