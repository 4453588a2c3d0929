"""The verb `quantize`: from a model's name to a finished folder, and the report of what it cost."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qcli import formats
from qcli.calibration.reported_columns import take_columns
from qcli.calibration.settings import calibration_on
from qcli.checkpoint import dtypes
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.model_dtype import model_dtype
from qcli.checkpoint.source import Source, open_source
from qcli.devices import pick_device
from qcli.errors import CheckpointError, PlanError, UsageError, one_of, together
from qcli.methods.choosing import made, methods_of, recipe_in_force, report_of, weighs_tokens
from qcli.process import peak_memory
from qcli.progress import Progress, bar_of
from qcli.quantization import outputs
from qcli.quantization.calibration_needs import cluster_problems, statistics_problems
from qcli.quantization.plan import Plan
from qcli.quantization.report import Report, sum_up
from qcli.quantization.room import check_output, find_memory
from qcli.quantization.settings import SETTINGS, run_settings
from qcli.quantization.tensor_parallel import problems as tensor_parallel_problems
from qcli.recipe import Recipe
from qcli.sizes import format_bytes, parse_size


def quantize(model: str, output: str | Path | None = None, **options: Any) -> Report:
    """Quantizes `model` (a folder or a hub id) into a new folder and returns the report.

    Options are those of `make_plan` and `run_plan`: bits, method, double_quant, block_size, threshold, group_size, search, skip,
    recipe, head, format, tensor_parallel, dtype, revision, trust_remote_code, stream, settings; device, overwrite, push_to_hub,
    cluster, workers.

    Raises QcliError kinds: UsageError for options, PlanError for every problem that headers show, CheckpointError, HubError,
    NonFiniteError. After any of them no folder stands under the final name, and the same call goes on where it stopped.
    """
    names = ("device", "overwrite", "push_to_hub", "cluster", "workers")
    running: dict[str, Any] = {name: options.pop(name) for name in names if name in options}
    options |= {"on_cluster": running.get("cluster") is not None, "upload": running.get("push_to_hub") is not None}
    plan = make_plan(model, output, overwrite=running.get("overwrite", False), **options)
    return run_plan(plan, **running)


def make_plan(
    model: str,
    output: str | Path | None = None,
    *,
    bits: int | None = None,
    method: str | None = None,
    double_quant: bool | None = None,
    block_size: int | None = None,
    threshold: float | None = None,
    group_size: int | None = None,
    search: str | None = None,
    skip: Iterable[str] = (),
    recipe: Recipe | None = None,
    head: int | None = None,
    format: str | None = None,
    tensor_parallel: int | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool = False,
    overwrite: bool = False,
    calibrate: bool = False,
    text: str | Path | None = None,
    tokens: int | None = None,
    check: bool = True,
    statistics: str | Path | None = None,
    save_statistics: str | Path | None = None,
    settings: Mapping[str, object] | None = None,
    on_cluster: bool = False,
    upload: bool = False,
) -> Plan:
    """Decides from headers and config alone what a run would do. Its `problems` hold all that stands against it.

    `head` is the bits of the output head, and of the embedding that is tied to it: 16 by default, 8 or 4. `tensor_parallel` is the
    number of GPUs over which a server will divide the model; what they cannot share becomes a problem. With `calibrate` texts
    decide how weights are rounded, where a method can use them: the first `tokens` tokens of the file `text`, or of the text that
    comes with qcli. A part is held out, and measures the result, unless `check` is false. What the texts say of the model is
    written to the file `save_statistics`, or read from the file `statistics`, which such a run has written. With `on_cluster` the
    machines of a cluster read the weights, and this one does not. With `upload` they send what they write to the hub: this machine
    then holds no weights, unless it calibrates.
    """
    options = {
        "double_quant": double_quant,
        "block_size": block_size,
        "threshold": threshold,
        "group_size": group_size,
        "search": search,
    }
    recipe, rest = recipe_in_force(recipe, bits, method, options, skip, format, settings or {}, SETTINGS, head, calibrate)
    run = run_settings(rest)
    one_of("dtype", dtype, ("auto", *dtypes.MODEL_DTYPES))
    bodies = [each.scheme for each in methods_of(recipe)]
    format_ = formats.holding(bodies, recipe.format)

    from qcli.memory.model.plain_layout import layout_of

    source = open_source(model, revision, stream=stream, trust_remote_code=trust_remote_code)
    if source.problems:
        raise PlanError(source.label, source.problems, source.again())
    source.read_elsewhere = on_cluster
    _take_scales(source)
    layout = layout_of(source, trust_remote_code=trust_remote_code, rules=run.modules == "rules")
    problems: list[str] = []
    notes = [*source.notes, *layout.notes, *source.carried.notes(source.place.size)]
    code = model_dtype(source, dtype)
    compute = run.compute_dtype
    if compute == "auto":
        compute = "bfloat16" if code == "F32" else dtypes.TORCH_NAMES[code]
    chosen = outputs.choose(layout, recipe, problems)
    if not chosen:
        problems.append("no module is left to quantize")
    if layout.missing:
        problems.append(together("parameters that no tensor of the checkpoint provides", layout.missing))
    if layout.expert_parameters:
        size = format_bytes(layout.expert_parameters * dtypes.ITEMSIZE[code])
        notes.append(
            f"fused experts stay {dtypes.TORCH_NAMES[code]}: {layout.expert_parameters:,} parameters, {size}; "
            "transformers 5 loads them in no other form from this format"
        )
    if recipe.head is not None and layout.head is not None:
        of_head = chosen[layout.head.linear.tensor].scheme
        format_ = formats.holding(bodies, recipe.format, of_head, layout.head.tied)
    if format_.name == "qcli":
        without = formats.holding(bodies).name != "qcli"
        way = "; with --head 16 others do, too" if recipe.head and recipe.format is None and without else ""
        notes.append(f"qcli alone reads the result{way}")
    columns = take_columns(chosen, layout, source.config, problems, notes)
    schemes = {linear.module: each.scheme for tensor, each in chosen.items() if (linear := layout.linear(tensor))}
    choice = formats.Choice(schemes, layout, problems, notes)
    config = format_.config(choice, compute)
    if tensor_parallel is not None:
        if tensor_parallel < 1:
            raise UsageError(f"tensor_parallel is {tensor_parallel}, expected 1 or more", "Give the number of GPUs.")
        quantized = [(linear, each.scheme) for tensor, each in chosen.items() if (linear := layout.linear(tensor))]
        problems += tensor_parallel_problems(tensor_parallel, quantized, format_.rows_together)
    planned = outputs.plan_tensors(source, layout, chosen, format_, code, problems)
    work, shards = outputs.place_outputs(planned, parse_size(run.max_shard_size), format_)
    plan = Plan(
        source=source,
        recipe=recipe,
        format=format_,
        decided_by=layout.decided_by,
        output=Path(output) if output is not None else _default_output(source.name, recipe, calibrate),
        dtype=code,
        compute_dtype=compute,
        quantization_config=config,
        work=[replace(each, columns=columns.get(each.info.name, ())) for each in work],
        shards=shards,
        notes=notes,
        problems=problems,
        allow_nonfinite=run.allow_nonfinite,
    )
    if any(getattr(w.method, "weights", "none") == "fisher" and not (w.method and weighs_tokens(w.method)) for w in plan.quantized):
        problems.append("weights=fisher weighs the tokens that decide how a weight is rounded, and none do; add --calibrate")
    if plan.calibrated:
        plan.calibration = calibration_on(text, tokens, run.sequence_length or None, check, run.order, statistics, save_statistics)
        problems += statistics_problems(plan)
        if on_cluster:
            problems += cluster_problems(plan)
        if run.modules == "rules":
            problems.append("texts pass a model as transformers runs it, whose modules rules do not know; leave out modules=rules")
        counts = [w.method.scheme.outlier_columns(w.linear.in_features) for w in plan.calibrated if w.method and w.linear]
        if all(w.method and w.method.scheme.outlier_share for w in plan.calibrated) and not any(counts):
            problems.append("the outlier_share is fewer than 8 columns in every module; give a larger one by --set outlier_share")
    elif calibrate and any(w.method and report_of(w.method) for w in plan.quantized):
        problems.append("--calibrate and outliers both choose the columns that stay in 16 bits; leave out one of the two")
    elif calibrate or any(each is not None for each in (text, tokens, statistics, save_statistics)):
        what = f"no text decides how {plan.method_name or 'these modules'} is rounded"
        if calibrate:
            problems.append(f"{what}; choose a method that texts help, such as nf4 or rtn, or leave out --calibrate")
        else:
            problems.append(f"{what} without --calibrate; add it, or leave out --text, --tokens and statistics")
    find_memory(plan)
    plan.uploads = on_cluster and upload and not plan.calibration
    check_output(plan, overwrite)
    return plan


def _take_scales(source: Source) -> None:
    """Sets aside the scales of a model that is published in FP8, which is quantized from what it decodes to. Raises CheckpointError
    for one that is quantized otherwise."""
    if not source.quantization:
        return
    format = formats.of_config(source.quantization)
    if format is None or format.name != "fp8":
        kind = source.quantization.get("quant_method", "an unnamed method")
        raise CheckpointError(
            f"{source.label} is quantized already ({kind})",
            "Quantize the original 16- or 32-bit checkpoint instead, or make one with qcli dequantize.",
        )
    format.check(source.quantization, f"{source.label}/config.json: quantization_config")
    owners = format.companions(source.tensors)
    weights = {w: source.tensors[w] for w in owners.values() if source.tensors[w].dtype == "F8_E4M3"}
    linears = [Linear(name, name.removesuffix(".weight"), *info.shape) for name, info in weights.items() if len(info.shape) == 2]
    format.read(source, linears, source.quantization)  # raises for scales that do not fit
    source.set_aside(owners)
    source.notes.append(f"{source.label} is in FP8: its weights are decoded first")


def _default_output(name: str, recipe: Recipe, calibrate: bool) -> Path:
    head = f"-head-{made(recipe.head).scheme.bits}" if recipe.head else ""
    return Path(f"{name}-{methods_of(recipe)[0].scheme.name}{'-calibrated' if calibrate else ''}{head}")


def run_plan(
    plan: Plan,
    *,
    device: str = "auto",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    cluster: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Executes a plan without problems. `progress(total, done)` gives a context manager with advance(bytes, name). `cluster` is an
    address as qcli.cluster.engine takes it: so many `workers` of that Ray cluster do the work, one a machine if None.

    Raises PlanError if the plan has problems; otherwise see `quantize`.
    """
    plan.check()
    from qcli.quantization import on_cluster, other_files
    from qcli.quantization.execute import execute, verify
    from qcli.quantization.staging import Staging

    started = time.monotonic()
    target = pick_device(device)
    branch = None
    if push_to_hub:
        from qcli.checkpoint import hub_upload

        hub_upload.check_can_push(push_to_hub)
        branch = on_cluster.branch_of(plan, push_to_hub) if cluster and plan.uploads else None
    with Staging(plan, overwrite=overwrite) as staging:
        plan.source.download_to(staging.downloads)
        other_files.carry_over(plan, staging)
        done = sum(plan.work[i].info.nbytes for i in staging.done)
        calibration = None
        with (
            bar_of(progress, plan.source_bytes, done) as bar,
            on_cluster.pool(cluster, workers, plan, staging, device, branch, bar) as pool,
        ):
            if plan.calibration:
                from qcli.quantization.calibration_run import CalibrationRun

                run = CalibrationRun(plan, device, staging, pool)
                calibration = run.round(bar.advance)
            if pool is None:
                execute(plan, staging, target, bar.advance)
            else:
                on_cluster.execute_on(pool, plan, staging, branch)
        if calibration:
            began = time.monotonic()
            calibration.checked = run.check()
            if calibration.checked:
                calibration.seconds["check"] = time.monotonic() - began
        kinds, worst, nonfinite = sum_up(plan, staging.done)
        warnings = other_files.write_rest(plan, staging, kinds, nonfinite, calibration)
        if branch:
            url = on_cluster.publish(plan, staging, branch)
        else:
            verify(plan, staging.folder)
            staging.publish()
    report = Report(
        output=branch.repo if branch else str(plan.output),
        method=plan.method_name,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        bits_per_weight=plan.bits_per_weight,
        quantized_modules=len(plan.quantized),
        kinds=kinds,
        worst=worst,
        nonfinite=nonfinite,
        seconds=time.monotonic() - started,
        peak_memory=peak_memory(),
        warnings=warnings,
        calibration=calibration,
        workers=[] if pool is None else pool.summary(),
    )
    if push_to_hub:
        report.url = url if branch else hub_upload.push(plan.output, push_to_hub)
    return report
