"""The verb `finetune`: a model and examples in, an adapter out; or with train=weights the model itself, trained.

`planned` says what a run will do, `train` does it. A run that was stopped, however it was, goes on where it stopped when the same
plan is trained again, and ends with the same folder.
"""

from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from qcli.checkpoint import dtypes
from qcli.checkpoint.model_dtype import model_dtype
from qcli.devices import place
from qcli.errors import CheckpointError, UsageError
from qcli.finetuning import lora
from qcli.finetuning.memory import estimated
from qcli.finetuning.plan import Plan, hashes
from qcli.finetuning.result import Finetuned
from qcli.finetuning.rows import Rows, read_rows
from qcli.finetuning.run import Run
from qcli.finetuning.settings import Options, rare_options
from qcli.finetuning.trained import Adapters, Trained
from qcli.finetuning.weights import Weights
from qcli.generation.decode import end_tokens
from qcli.loading.opening import asked_recipe
from qcli.progress import Progress
from qcli.quantization.staging import exists_error
from qcli.recipe import Recipe
from qcli.streaming.skeleton import Skeleton


def finetune(model: str, data: str | Path, output: str | Path | None = None, **options) -> Finetuned:
    """Trains low-rank adapters of `model`, a folder or hub id, on `data`; see `planned` for the options. The folder `output` is
    PEFT's own. With train=weights the weights of `model` are trained, and the folder is a checkpoint of the whole. A run that was
    stopped goes on.

    Raises UsageError, CheckpointError, DeviceError, HubError, NonFiniteError, PlanError. After any of them no folder stands under
    the name of the output.
    """
    overwrite, progress = options.pop("overwrite", False), options.pop("progress", None)
    return train(planned(model, data, output, overwrite=overwrite, **options), overwrite=overwrite, progress=progress)


def planned(
    model: str,
    data: str | Path,
    output: str | Path | None = None,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    target: str = lora.ALL_LINEAR,
    epochs: float | None = None,
    steps: int | None = None,
    lr: float = 2e-4,
    batch: int = 16,
    max_tokens: int = 2048,
    too_long: str | None = None,
    held_out: str | Path | float | Fraction | None = None,
    seed: int = 0,
    bits: int | None = None,
    method: str | None = None,
    recipe: Recipe | None = None,
    skip: Iterable[str] = (),
    settings: Mapping[str, object] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Plan:
    """The plan of a run. `data` is a .jsonl or .txt file, or a folder with train and valid files. `held_out` is a file, or a share
    of the rows; None holds a twentieth out. `bits`, `method` or `recipe` quantizes an unquantized model as it is read; without, its
    adapters are plain LoRA. `settings` are the fields of qcli.finetuning.settings.Rare by name.

    Raises UsageError, CheckpointError, DeviceError, HubError.
    """
    options = Options(
        rank=rank,
        alpha=alpha,
        target=target,
        epochs=epochs,
        steps=steps,
        lr=lr,
        batch=batch,
        max_tokens=max_tokens,
        too_long=too_long,
        seed=seed,
        rare=rare_options(settings or {}),
    )
    share = _share(held_out)
    contents = hashes(data, share)
    asked = asked_recipe(recipe, bits, method, {}, skip, {})
    placement = place(device, None, None)
    skeleton = Skeleton(model, dtype=dtype, device="cpu", revision=revision, trust_remote_code=trust_remote_code)
    source, tokenizer = skeleton.source, skeleton.tokenizer
    whole = options.rare.train == "weights"
    if asked and source.quantization and not whole:
        raise CheckpointError(f"{model} is quantized already", "Leave out --bits and --method.")
    final = Path(output) if output is not None else Path(f"{source.name}-{'finetuned' if whole else 'adapter'}")
    if final.exists() and not overwrite:
        raise exists_error(final)
    if not source.is_hub and final.resolve() == Path(source.label).resolve():
        raise UsageError(f"the output {final} is the model itself, and an input is never touched", "Choose another --output.")
    names = lora.linear_modules(skeleton.model)
    targets = [(name, *_shape(skeleton.model.get_submodule(name))) for name in lora.targets_of(names, target)]
    code = model_dtype(source, dtype)
    if whole:
        trained: Trained = Weights(source, targets, options, asked, final, dtypes.TORCH_NAMES[code], overwrite)
    else:
        trained = Adapters(source, targets, options, asked)
    limit = skeleton.model.config.get_text_config(decoder=True)
    longest = getattr(limit, "max_position_embeddings", None)
    if longest and max_tokens > longest:
        options = Options(**(vars(options) | {"max_tokens": longest}))
    loss = None if options.rare.loss == "auto" else options.rare.loss
    rows = read_rows(
        tokenizer,
        source.label,
        data,
        held_out=share,
        max_tokens=options.max_tokens,
        too_long=too_long,
        loss=loss,
        ends=sorted(end_tokens(skeleton.model, tokenizer)),
        seed=seed,
    )
    on_gpu = bool(placement.gpus())
    choice = options.rare.checkpointing
    plan = Plan(
        skeleton=skeleton,
        recipe=asked,
        output=final,
        options=options,
        rows=rows,
        trained=trained,
        placement=placement,
        dtype=dtypes.TORCH_NAMES[code],
        checkpointing=on_gpu if choice == "auto" else choice == "true",
        data=contents,
        notes=trained.notes + _notes(rows, options, max_tokens),
    )
    if plan.dtype == "float16":
        plan.notes.append("small gradients vanish in float16: take --dtype bfloat16, or float32 on an old GPU, if the loss stays")
    plan.memory, plan.free = estimated(plan)
    return plan


def train(plan: Plan, *, overwrite: bool = False, progress: Progress | None = None) -> Finetuned:
    """Trains what `plan` says. See `finetune`."""
    plan.check()
    with Run(plan, overwrite=overwrite) as run:
        return run.train(progress)


def _share(held_out: str | Path | float | Fraction | None) -> str | Path | Fraction | None:
    """A file, or a share of the rows, exact as it is written."""
    if held_out is None or isinstance(held_out, Path):
        return held_out
    try:
        share = Fraction(str(held_out))
    except ValueError:
        return str(held_out)
    if not 0 <= share < 1:
        raise UsageError(f"--eval is {held_out}, expected a file, or a share from 0 to below 1")
    return share


def _shape(module) -> tuple[int, int]:
    """(out_features, in_features)."""
    if hasattr(module, "out_features"):
        return module.out_features, module.in_features
    return module.weight.shape[1], module.weight.shape[0]  # transformers' Conv1D


def _notes(rows: Rows, options: Options, asked: int) -> list[str]:
    encoding, notes = rows.encoding, []
    counts = rows.counts
    if options.max_tokens < asked and (counts.cut or counts.split or counts.dropped):
        notes.append(f"the model's context holds {options.max_tokens:,} tokens: rows are no longer than that")
    if encoding.end is None:
        notes.append("the tokenizer has no token that ends a text, so the model does not learn to stop")
    elif encoding.ends and encoding.end not in encoding.ends:
        notes.append(f"the token that ends a row ({encoding.end}) is none that ends the model's texts")
    if encoding.apart:
        notes.append(
            f"{encoding.apart:,} prompts would end in another token with the completion behind them: those two are read apart, as "
            "qcli generate reads the prompt"
        )
    if encoding.unended:
        notes.append(f"{encoding.unended:,} conversations end with no token that ends the model's texts: check its chat template")
    if not rows.held_out:
        notes.append("no rows are held out: the loss on new text will not be known, and the last step is kept")
    notes += [f"left out: {sentence}" for sentence in rows.counts.dropped[:5]]
    if len(rows.counts.dropped) > 5:
        notes.append(f"left out: {len(rows.counts.dropped) - 5:,} more rows")
    return notes
