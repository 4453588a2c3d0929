"""Loads a model through transformers' own from_pretrained, with a quantizer registered there that puts our modules in.

Renames, fused experts, tied weights and buffers stay transformers' business. A checkpoint in bitsandbytes' format is loaded
without bitsandbytes; an unquantized one can be quantized as it is read, one weight at a time, so that the full-precision
model never exists in memory.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import transformers

from qcli import formats
from qcli.checkpoint import dtypes
from qcli.checkpoint.layout import Layout
from qcli.checkpoint.model_dtype import model_dtype
from qcli.checkpoint.modules import model_layout, reason, transformers_class
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import Source
from qcli.checkpoint.stored_tensor import state_dict
from qcli.devices import DeviceChoice, place
from qcli.errors import CheckpointError, QcliError, UsageError, one_of, together
from qcli.formats._reading import made_again
from qcli.loading import generation_config, out_of_memory
from qcli.loading.adapter import Adapter, open_adapter
from qcli.loading.attach import adapters_tokenizer, attach
from qcli.loading.opening import asked_recipe, open_checkpoint
from qcli.loading.room import check_room
from qcli.loading.tokenizer import read_tokenizer
from qcli.loading.transformers_quantizer import LoadingStopped, NoRoom, QcliConfig
from qcli.memory.model.plain_layout import plain_layout
from qcli.methods.choosing import made, methods_of
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.process import available_memory
from qcli.recipe import Recipe


def load(
    model: str,
    *,
    bits: int | None = None,
    method: str | None = None,
    double_quant: bool | None = None,
    block_size: int | None = None,
    threshold: float | None = None,
    group_size: int | None = None,
    skip: Iterable[str] = (),
    recipe: Recipe | None = None,
    head: int | None = None,
    settings: Mapping[str, object] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | dict | None = None,
    max_memory: str | Mapping[int | str, int | str] | None = None,
    int8_activations: bool | None = True,
    adapter: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """Returns (transformers model, tokenizer or None) of a folder or hub id; the model's own `.generate()` works.

    A checkpoint quantized by qcli, or by transformers with bitsandbytes, is run as it is stored. `bits` (8 or 4), `method` or
    `recipe` quantizes an unquantized one as it is read, with the options that `quantize` takes; `head` is the bits of its output
    head. `dtype` is that of everything
    unquantized: auto keeps the config's. `device_map` "auto" splits the model over GPUs and CPU memory by accelerate's rules,
    quantized on each; `max_memory` limits it per GPU or "cpu": {0: "20GB", "cpu": 30 * 10**9}, or "0=20GB,cpu=30GB". With
    `int8_activations` False an LLM.int8() model keeps its activations in 16 bits; with None, in decoding steps on a CPU.
    `adapter`, a folder or hub id, is a LoRA adapter in PEFT's layout, which the model's linear modules then add to their outputs; a
    tokenizer beside it is taken for the model's.

    Raises UsageError, CheckpointError (missing, extra and misshaped tensors together), HubError, DeviceError.
    """
    options = {"double_quant": double_quant, "block_size": block_size, "threshold": threshold, "group_size": group_size}
    asked = asked_recipe(recipe, bits, method, options, skip, settings or {}, head)
    placement = place(device, device_map, max_memory)
    adapted = None if adapter is None else open_adapter(adapter)
    source = open_checkpoint(model, revision, trust_remote_code)
    return load_source(source, asked, dtype=dtype, placement=placement, int8_activations=int8_activations, adapter=adapted)


def load_source(
    source: Source,
    recipe: Recipe | None,
    *,
    dtype: str,
    placement: DeviceChoice,
    int8_activations: bool | None,
    adapter: Adapter | None = None,
):
    """`load`, of a checkpoint that `open_checkpoint` has opened, and an adapter that `open_adapter` has."""
    one_of("dtype", dtype, ("auto", *dtypes.MODEL_DTYPES))
    model, trust_remote_code, stored = source.label, source.trusted, source.quantization
    wanted = methods_of(recipe)[0].scheme.name if recipe else None
    if stored and wanted:
        raise CheckpointError(f"{model} is quantized already", "Leave out --bits and --method.")
    _check_room(source, wanted, made(recipe.head).scheme.bits if recipe and recipe.head else None, dtype, placement)
    source.fetch_what_runs()
    free = out_of_memory.free_memory(placement.gpus())
    with quiet(), ExitStack() as opened:
        built, config = transformers_class(source, trust_remote_code)
        if built is None:
            names = ", ".join(source.architectures) or source.config.get("model_type") or "none named"
            raise CheckpointError(
                f"{model}: transformers {transformers.__version__} does not know its architecture ({names})",
                "Install a newer transformers; if the model brings its own code, read it and pass --trust-remote-code.",
            )
        layout = plain_layout(source) or stored_layout(source, built, config)
        check_fits(source, layout)
        if adapter:
            adapter.warn_of_other_base(source, recipe)
            adapter.check_names(layout, model)
        if recipe:
            _check_recipe(recipe, layout, model)
        options = {"dtype": dtypes.torch_dtype(model_dtype(source, dtype))}
        if (rules := generation_config.for_loading(source, config)) is not None:
            options["generation_config"] = rules
        if stored:
            config.quantization_config = vars(stored_config(source, layout, dtype))
        elif recipe:
            options["quantization_config"] = QcliConfig(recipe=recipe, head=layout.head)
        try:
            loaded, info = built.from_pretrained(
                None,
                config=config,
                state_dict=state_dict(source, opened, _held(source)),
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **placement.arguments(),
                **options,
            )
            if "disk" in (getattr(loaded, "hf_device_map", None) or {}).values():
                raise NoRoom
        except NoRoom:
            raise out_of_memory.without_room(source, wanted, dtype, placement.limits()) from None
        except (LoadingStopped, Exception) as e:  # from_pretrained raises many kinds
            if placement.splits and "offload_folder" in str(e):  # transformers asks for one where layers would go to the disk
                raise out_of_memory.without_room(source, wanted, dtype, placement.limits()) from None
            if isinstance(e, LoadingStopped) or out_of_memory.is_out_of_memory(e):
                raise out_of_memory.while_loading(source, wanted, dtype, free, placement.splits) from e
            if isinstance(e, QcliError):
                raise
            raise CheckpointError(f"{model}: transformers cannot load it: {reason(e)}", source.again()) from e
        _check_complete(source, info)
        loaded.config.name_or_path = str(source.config_folder)
        tokenizer = read_tokenizer(source, trust_remote_code, config)
        if adapter:
            tokenizer = adapters_tokenizer(adapter, tokenizer, trust_remote_code, config)
    if adapter:
        attach(loaded, adapter, model)
    if not int8_activations:
        head = loaded.get_submodule(layout.head.module) if layout.head else None
        _keep_activations(model, loaded, head, always=int8_activations is False)
    return loaded.eval(), tokenizer


def _held(source: Source) -> Callable[[TensorInfo], bool]:
    """Whether a loaded model holds a tensor: each one costs transformers a fraction of a millisecond, and tables are many."""
    format = formats.of_config(source.quantization) if source.quantization else None
    return format.in_module if format else lambda info: True


def _check_recipe(recipe: Recipe, layout: Layout, label: str) -> None:
    """Raises UsageError where `recipe` does not fit the modules of the model."""
    if unmatched := recipe.unmatched([*(linear.module for linear in layout.linears.values()), *layout.default_skip]):
        raise UsageError(f"{unmatched[0]!r} matches no module of {label}", "Give a full name, or a glob such as '*.down_proj'.")
    if recipe.head:
        check_head(layout, label)
    of_head = made(recipe.head).scheme if recipe.head else None
    tied = layout.head is not None and layout.head.tied
    format = formats.holding([each.scheme for each in methods_of(recipe)], recipe.format, of_head, tied)
    chosen = [(linear, recipe.choice(linear.module)) for linear in layout.quantizable()]
    if recipe.head:
        chosen.append((layout.head.linear, recipe.head))
    for linear, choice in chosen:
        shape = linear.out_features, linear.in_features
        if not choice.keeps and (reason := format.refuses_shape(made(choice).scheme, *shape)):
            raise UsageError(
                f"{label}, {linear.module}: {reason}", "Choose other options, or leave the module as it is with --skip."
            )


def check_head(layout: Layout, label: str) -> None:
    """Raises UsageError where no output head can be quantized. `label` names the model."""
    if layout.head is None:
        raise UsageError(f"{label}: no output head can be quantized: {layout.no_head}", "Leave out --head, or the recipe's head.")


def stored_layout(source: Source, built: type, config) -> Layout:
    """`model_layout` of a checkpoint that may be quantized, whose codes some formats store under other names than the weights'."""
    format = formats.of_config(source.quantization) if source.quantization else None
    return model_layout(source, built, config, format.weight_name if format else str)


def stored_config(source: Source, layout: Layout, dtype: str) -> QcliConfig:
    """What our quantizer must know of a quantized checkpoint: what is stored of each module. `dtype` is "auto" or what to compute
    in. Raises CheckpointError."""
    format = formats.of_config(source.quantization)
    linears = layout.linears | ({layout.head.linear.tensor: layout.head.linear} if layout.head else {})
    modules = format.read(source, list(linears.values()), source.quantization)
    head = layout.head if layout.head and layout.head.linear.module in modules else None
    return QcliConfig(modules=modules, compute_dtype=None if dtype == "auto" else dtype, head=head)


def _check_room(source: Source, wanted: str | None, head: int | None, dtype: str, placement: DeviceChoice) -> None:
    """Refuses, before weights are fetched or read, what a single device has no room for. Splits find their own room."""
    if set(placement.device_map) != {""}:
        return
    gpus = placement.gpus()
    if gpus:
        check_room(source, wanted, dtype, out_of_memory.free_memory(gpus)[gpus[0]][0], "GPU memory", head)
        return
    # On a CPU unquantized weights stay in the mapped file, whose pages the system takes back as it needs.
    mapped = wanted is None and not source.quantization and dtype == "auto"
    free = available_memory()
    if free is not None and not mapped:
        check_room(source, wanted, dtype, free, "memory", head)


def _keep_activations(label: str, loaded: torch.nn.Module, head: torch.nn.Module | None, always: bool) -> None:
    modules = [m for m in loaded.modules() if isinstance(m, QuantizedLinear) and m.rounds_activations]
    if always and not modules:
        raise UsageError(
            f"--no-int8-activations: {label} rounds no activations", "Leave it out, or add --bits 8 to an unquantized model."
        )
    for module in modules:
        if always or module is head:
            module.rounds_activations = False
        else:
            module.rounds_few = False


def check_fits(source: Source, layout: Layout) -> None:
    """Raises CheckpointError where tensors are missing or misshaped, by headers alone: what does not fit is never allocated."""
    decoded = formats.quantized_weights(source)
    misshaped = [
        f"{name} (stored {list(stored)}, the model has {list(expected)})"
        for name, (stored, expected) in layout.misshaped.items()
        if name not in decoded
    ]
    codes = {source.tensors[name].dtype for name in layout.linears if name not in decoded} - set(dtypes.FLOATS)
    undecoded = [name for name in layout.linears if name not in decoded and source.tensors[name].dtype in codes]
    strays = sorted(n for n in decoded if n in source.tensors and layout.linear(n) is None and n not in layout.unknown)
    kinds = (
        ("quantized, which are no linear modules in this transformers", strays),
        ("missing", layout.missing),
        ("misshaped", misshaped),
        (f"stored as {' and '.join(sorted(codes))} without what would decode them", undecoded),
    )
    parts = [together(what, names) for what, names in kinds if names]
    if parts:
        raise CheckpointError(f"{source.label} does not fit its model: {'; '.join(parts)}", made_again(source))


def _check_complete(source: Source, info: dict) -> None:
    """What headers could not show. Raises CheckpointError."""
    missing, misshaped = sorted(info["missing_keys"]), sorted(str(entry[0]) for entry in info["mismatched_keys"])
    parts = [together(what, names) for what, names in (("missing", missing), ("misshaped", misshaped)) if names]
    if parts:
        raise CheckpointError(f"{source.label} does not fit its model: {'; '.join(parts)}", source.again())


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' bars and advice, and accelerate's, off while it loads."""
    models, hooks = transformers.utils.logging, logging.getLogger("accelerate")
    verbosity, level, bars = models.get_verbosity(), hooks.level, models.is_progress_bar_enabled()
    models.set_verbosity_error()
    hooks.setLevel(logging.ERROR)
    models.disable_progress_bar()
    try:
        yield
    finally:
        models.set_verbosity(verbosity)
        hooks.setLevel(level)
        if bars:
            models.enable_progress_bar()
