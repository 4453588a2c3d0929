"""The verb `merge`: a LoRA adapter and its base in, one model of the two out, which needs no adapter.

W' = W + scaling B A, in float32, rounded once to the model's dtype. W of a quantized base is what its codes decode to: that is what
the adapter was trained on, so that merging loses nothing but the last rounding. Merged into the weights that the base was made
from, or into codes, an adapter loses a part of what it learnt (docs/merge.md has figures). Module after module is read, changed and
written, so memory holds a few tensors. A run that was stopped goes on where it stopped.
"""

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qcli import __version__
from qcli.checkpoint import dtypes
from qcli.checkpoint.source import Source, open_source
from qcli.errors import QcliError, UsageError, one_of
from qcli.evaluation.evaluate import evaluate
from qcli.files.foreign_json import read_object
from qcli.loading.adapter import open_adapter
from qcli.methods.errors import ErrorSums
from qcli.process import peak_memory
from qcli.progress import Progress, shown
from qcli.quantization import other_files
from qcli.quantization.adapter_base import base_of, original_of, quantized_as_read
from qcli.quantization.dequantize import write_rest
from qcli.quantization.execute import execute
from qcli.quantization.merging import Merging, merging_tasks, plan_merging
from qcli.quantization.quantize import make_plan, run_plan
from qcli.quantization.room import check_output
from qcli.quantization.staging import Staging, exists_error

ONTO = ("quantized", "original")
BITS = (16, 8, 4)


@dataclass
class Merged:
    """What a run did. Sizes are bytes of weights. `relative_change` is ||scaling B A|| / ||W|| over all merged weights. `losses` of
    the text are in nats a token: of the base with the adapter, and of the output."""

    output: str
    adapter: str
    base: str
    onto: str
    modules: int
    relative_change: float
    dtype: str
    bits: int
    source_bytes: int
    output_bytes: int
    losses: dict[str, float] | None
    seconds: float
    peak_memory: int

    def summary(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"seconds": round(self.seconds, 3), "relative_change": float(f"{self.relative_change:.4g}")}


def merge(
    adapter: str,
    output: str | Path | None = None,
    *,
    base: str | None = None,
    onto: str = ONTO[0],
    bits: int = BITS[0],
    text: str | Path | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Writes the model that `adapter`, a folder or hub id with a LoRA adapter, makes of its base.

    `base` says where the base is, if not where the adapter's config says, and allows another one. `onto` "original" takes the
    weights that a quantized base was made from, as its qcli.json names them, in place of what its codes decode to. `bits` 8 or 4
    quantizes the result as `quantize` does. `text` is a held-out text, whose loss is measured before and after.

    Raises UsageError, CheckpointError for what does not fit or cannot be found, PlanError for what stands against writing,
    HubError, NonFiniteError. After any of them no folder stands under the final name, and the same call goes on where it stopped.
    """
    one_of("onto", onto, ONTO)
    if bits not in BITS:
        raise UsageError(f"bits is {bits!r}, expected one of 16, 8, 4")
    if text is not None and not Path(text).is_file():
        raise UsageError(f"there is no file {text}", "Give a .txt or .jsonl file of held-out text.")
    started = time.monotonic()
    adapted = open_adapter(adapter)
    target = Path(output) if output is not None else Path(f"{adapted.name}-merged")
    if target.exists() and not overwrite:
        raise exists_error(target)
    source = stated = trained_on = base_of(adapted, base, trust_remote_code)
    between = []
    if onto == "original" and trained_on.quantization:
        source = stated = original_of(trained_on, base)
    elif onto == "quantized" and adapted.recipe and not trained_on.quantization:
        between.append(target.with_name(f".{target.name}.base"))
        source = trained_on = quantized_as_read(trained_on, adapted.recipe, between[0], progress)
    whole = target if bits == 16 else target.with_name(f".{target.name}.merged")
    plan = plan_merging(source, adapted, whole)
    plan.stated = stated
    losses = None
    if text is not None:
        losses = {"adapter": _loss(trained_on, text, progress, adapter=adapter)}
    changed = _run(plan, overwrite, target, progress)
    size, dtype = plan.output_bytes, dtypes.TORCH_NAMES[plan.dtype]
    if bits != 16:
        quantizing = make_plan(str(whole), target, bits=bits, trust_remote_code=trust_remote_code, overwrite=overwrite)
        quantizing.source.name = f"{stated.name}-{adapted.name}"
        report = run_plan(quantizing, overwrite=overwrite, progress=progress)
        size, dtype = report.output_bytes, report.method
        between.append(whole)
    if losses is not None and text is not None:
        losses["merged"] = _loss(open_source(str(target), trust_remote_code=trust_remote_code), text, progress)
    for folder in between:
        shutil.rmtree(folder)
    return Merged(
        output=str(target),
        adapter=adapted.label,
        base=stated.label,
        onto="quantized" if source.quantization else "original",
        modules=len(plan.merged),
        relative_change=changed,
        dtype=dtype,
        bits=bits,
        source_bytes=sum(info.nbytes for info in stated.tensors.values()),
        output_bytes=size,
        losses=losses,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
    )


def _run(plan: Merging, overwrite: bool, final: Path, progress: Progress | None) -> float:
    """Carries the plan out. Returns the relative change. `final` is the folder that the result will be quantized into, or the
    plan's own."""
    between = plan.output != final
    if between and _is_made(plan):
        return _stated_change(plan)
    if between:
        _drop_what_was_begun(plan.output, final)
    check_output(plan, overwrite or between)
    plan.check()
    adapter = plan.adapter
    with Staging(plan, overwrite=overwrite or between) as staging:
        other_files.carry_over(plan, staging)
        for name in adapter.tokenizer_files:
            staging.add_file(name, adapter.place.local(name).read_bytes())
        done = sum(plan.work[i].info.nbytes for i in staging.done)
        with shown(progress, plan.source_bytes, done) as advance:
            execute(plan, staging, torch.device("cpu"), advance, merging_tasks)
        sums = [staging.done[w.index] for w in plan.work if w.info.name in plan.merged]
        total = ErrorSums(sum(each.squared_error for each in sums), sum(each.squared_norm for each in sums))
        write_rest(plan, staging, _provenance(plan, total.relative_error))
        staging.publish()
    return total.relative_error


def _is_made(plan: Merging) -> bool:
    """Whether an earlier run has merged the same already, and was stopped while it quantized the result."""
    made = plan.output / "qcli.json"
    if not made.exists():
        return False
    try:
        return read_object(made, str(made), "").get("identity") == plan.identity
    except QcliError:
        return False


def _stated_change(plan: Merging) -> float:
    made = plan.output / "qcli.json"
    return float(read_object(made, str(made), "Delete the folder and run again.")["relative_change"])


def _drop_what_was_begun(whole: Path, final: Path) -> None:
    """Deletes what an earlier run quantized of the merged model `whole` with other matrices: its headers may be the same."""
    begun = final.with_name(final.name + ".partial")
    state = begun / ".qcli" / "plan.json"
    if whole.exists() and state.exists():
        source = open_source(str(whole)).fingerprint
        if read_object(state, str(state), "Delete the folder to start anew.").get("source") == source:
            shutil.rmtree(begun)


def _provenance(plan: Merging, change: float) -> dict[str, object]:
    """What qcli.json says: where the weights come from."""
    source, adapter = plan.stated, plan.adapter
    return {
        "qcli": __version__,
        "source": {
            "name": source.label if source.is_hub else source.name,
            "revision": source.revision,
            "fingerprint": source.fingerprint,
        },
        "adapter": {
            "name": adapter.label if adapter.place.is_hub else adapter.name,
            "revision": adapter.place.revision,
            "fingerprint": adapter.fingerprint,
        },
        "quantized_as_read": adapter.recipe.summary() if plan.source is not source and adapter.recipe else None,
        "merged_modules": len(plan.merged),
        "relative_change": change,
        "dtype": dtypes.TORCH_NAMES[plan.dtype],
        "identity": plan.identity,
    }


def _loss(source: Source, text: str | Path, progress: Progress | None, adapter: str | None = None) -> float:
    """The loss of a text in nats a token."""
    found = evaluate(
        source.label,
        adapter=adapter,
        text=text,
        revision=source.revision if source.is_hub else None,
        trust_remote_code=source.trusted,
        progress=progress,
    )
    return found.rows[-1].quality.loss.value
