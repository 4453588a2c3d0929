"""Which tensors of a checkpoint are the weights of linear modules.

The model's transformers class, built on the meta device, decides: only modules that transformers converts when it loads a
bitsandbytes checkpoint may be quantized. For an architecture that transformers does not know, rules by name and shape decide;
the plan says so.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from qcli.checkpoint.config_json import for_transformers
from qcli.checkpoint.layout import Layout, Linear, OutputHead
from qcli.checkpoint.names import may_be_linear
from qcli.errors import CheckpointError

_MODULES_A_TENSOR, _MODULES_AT_LEAST = 50, 20_000  # real models have at most 4 modules per tensor
_RULES_MIN_FEATURES = 32  # a narrower 2-D weight is a gate, a bias table or a projection too small to matter


def find_linears(source, *, trust_remote_code: bool = False, rules: bool = False) -> Layout:
    """The layout of `source`'s model. `rules` asks for the rules by name and shape even if transformers knows the architecture.

    Raises CheckpointError where transformers knows the architecture but cannot build it from this config.
    """
    if rules:
        return _by_rules(source, "rules by name and shape, as asked")
    model_class, config = transformers_class(source, trust_remote_code)
    if model_class is None:
        names = ", ".join(source.architectures) or source.config.get("model_type") or "none named"
        return _by_rules(source, f"rules by name and shape: transformers does not know the architecture {names}")
    layout = model_layout(source, model_class, config)
    _check_converts(source, layout, model_class)
    return layout


def transformers_class(source, trust_remote_code: bool):
    """(model class, config) with which transformers loads `source`; (None, None) where it does not know the architecture.

    Raises CheckpointError.
    """
    import transformers

    folder = source.config_folder
    architecture = (source.architectures or [None])[0]
    remote = {key: value for key, value in (source.config.get("auto_map") or {}).items() if isinstance(value, str)}
    model_type = source.config.get("model_type")
    known = model_type in transformers.CONFIG_MAPPING
    if not known:
        if not remote:
            return None, None
        if not trust_remote_code:
            raise CheckpointError(
                f"{source.label}: the model's code comes with the checkpoint ({next(iter(remote.values()))}) and is not run "
                "unless allowed",
                "Read that code, then pass --trust-remote-code; or pass --set modules=rules to use names and shapes.",
            )
    try:
        if known and not (remote.get("AutoConfig") and trust_remote_code):
            config = transformers.CONFIG_MAPPING[model_type].from_dict(for_transformers(source.config))
        else:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            if not source.quantization and hasattr(config, "quantization_config"):
                del config.quantization_config  # it is empty; loaders would take the model for a quantized one
    except Exception as e:  # transformers raises many kinds for a config it cannot read
        raise CheckpointError(
            f"{source.label}/config.json: transformers cannot read it: {reason(e)}",
            "Mend the config, or pass --set modules=rules to use names and shapes.",
        ) from e
    reference = _own_class(remote, architecture) if trust_remote_code else None
    if reference:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            return get_class_from_dynamic_module(reference, folder), config
        except Exception as e:  # somebody's own code
            raise CheckpointError(
                f"{source.label}: the code of {reference} cannot be loaded: {reason(e)}", "Install what it needs, or mend it."
            ) from e
    model_class = getattr(transformers, architecture, None) if architecture else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        # transformers has no class of this name (an old name, or a fine-tune's own): model_type decides.
        model_class = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return model_class, config


def _own_class(auto_map: Mapping[str, str], architecture: str | None) -> str | None:
    """The entry of `auto_map` for the class that config.json names, else for a causal LM, else for any other model."""
    named = [value for key, value in auto_map.items() if key != "AutoConfig" and value.endswith(f".{architecture}")]
    kinds = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel")
    return next(iter([*named, *(auto_map[kind] for kind in kinds if kind in auto_map)]), None)


def model_layout(source, model_class, config, weight_name: Callable[[str], str] = str) -> Layout:
    """The layout of the transformers model of this class and config. Raises CheckpointError where the model cannot be built.

    `weight_name` maps the name of a stored tensor to the name of the weight that it stands for.
    """
    import torch
    from torch import nn
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert

    try:
        with torch.device("meta"), warnings.catch_warnings(), modules_within(source):
            warnings.simplefilter("ignore")
            model = model_class(config)
    except Exception as e:  # a config can be wrong in as many ways as there are models
        raise CheckpointError(
            f"{source.label}: {model_class.__name__} cannot be built from config.json: {reason(e)}",
            "Check the config's fields, or pass --set modules=rules to use names and shapes.",
        ) from e
    layout = Layout(decided_by=f"transformers' {model_class.__name__}")
    layout.default_skip = sorted(get_keys_to_not_convert(model))
    layout.keep_fp32 = sorted(model._keep_in_fp32_modules or [])
    layout.keep_fp32_strict = sorted(model._keep_in_fp32_modules_strict or [])
    layout.always_skip = layout.keep_fp32

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    state = model.state_dict()
    prefix = model.base_model_prefix
    merged = set()  # parameters that transformers builds from several tensors
    for name in source.tensors:
        weight = weight_name(name)
        renamed, pattern = rename_source_key(weight, renamings, converters, prefix, state)
        if renamed not in state and weight in state:
            renamed, pattern = weight, None
        layout.modules[name] = renamed
        if pattern is not None:
            converter = next(c for c in converters if pattern in c.source_patterns)
            merged.update(renamed.replace(converter.target_patterns[0], target) for target in converter.target_patterns)
    provided = set(layout.modules.values()) | merged

    by_module = {renamed: name for name, renamed in layout.modules.items()}
    for module_name, module in model.named_modules():
        if type(module) is not nn.Linear and not isinstance(module, Conv1D):
            continue
        layout.candidates.append(module_name)
        weight = f"{module_name}.weight"
        tensor = by_module.get(weight)
        if tensor is None or weight in merged:
            continue
        transposed = isinstance(module, Conv1D)
        shape = tuple(module.weight.shape)
        out_features, in_features = reversed(shape) if transposed else shape
        layout.linears[tensor] = Linear(tensor, module_name, out_features, in_features, transposed)
    layout.linear_kinds = sorted({type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear)})
    groups = tied_groups(model.all_tied_weights_keys)
    found = _head(model, {name: tensor for name, tensor in by_module.items() if name not in merged}, groups)
    layout.head, layout.no_head = (None, found) if isinstance(found, str) else (found, "")
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or []
    layout.missing = sorted(
        name
        for name, _ in model.named_parameters()
        if provided.isdisjoint(groups.get(name, {name})) and not any(re.search(p, name) for p in ignored)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layout.misshaped = {
        name: (info.shape, shapes[layout.modules[name]])
        for name, info in source.tensors.items()
        if layout.modules[name] in shapes and layout.modules[name] not in merged and info.shape != shapes[layout.modules[name]]
    }
    unknown = [name for name, renamed in layout.modules.items() if renamed not in state and renamed not in merged]
    layout.unknown = set(unknown)
    if unknown:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        layout.notes.append(f"{len(unknown)} tensors do not belong to {model_class.__name__} and are copied: {shown}")
    layout.expert_parameters = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n)
    return layout


def _head(model, stored: Mapping[str, str], groups: Mapping[str, set[str]]) -> OutputHead | str:
    """The head of a transformers model, or why none can be quantized. `stored` maps parameters to the tensors that are them,
    `groups` is of `tied_groups`."""
    from torch import nn

    try:
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        head = embedding = None
    if head is None or embedding is None:
        return "the model has none"
    if type(head) is not nn.Linear:
        return f"it is a {type(head).__name__}, expected a Linear"
    names = {id(module): name for name, module in model.named_modules()}
    module, other = names.get(id(head)), names.get(id(embedding))
    if module is None or other is None:
        return "it is no module of the model"
    if f"{module.rpartition('.')[2]}.weight.dtype" in _forward_source(model):
        return "the model casts what it reads to the dtype of its weight"
    weights = [f"{module}.weight", f"{other}.weight"]
    group = groups.get(weights[0], {weights[0]})
    tied = weights[1] in group
    found = [name for name in weights[: 1 + tied] if name in stored]
    if not group <= set(weights):
        return "it is tied to more than the embedding of its input"
    if tied and (head.bias is not None or lookup_scale(embedding, head.weight.dtype) is None):
        return f"it is tied to a {type(embedding).__name__}" if head.bias is None else "it is tied, and has a bias"
    if len(found) != 1:
        return "the embedding that it is tied to is stored beside it" if found else "its weight is not stored by itself"
    return OutputHead(Linear(stored[found[0]], found[0].removesuffix(".weight"), *head.weight.shape), module, other, tied)


def _forward_source(model) -> str:
    try:
        return inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # code without a file
        return ""


def lookup_scale(module, dtype) -> float | None:
    """What an embedding multiplies its rows by, which it yields in the torch `dtype`. None for a module that does more."""
    import torch
    from torch import nn

    if not isinstance(module, nn.Embedding):
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    if not type(module).__name__.endswith("ScaledWordEmbedding"):
        return None
    scale = getattr(module, "embed_scale", None)
    if isinstance(scale, torch.Tensor):  # which is rounded to the rows' dtype, and has no value on the meta device
        stated = getattr(module, "scalar_embed_scale", None)
        return None if stated is None else float(torch.tensor(stated, device="cpu").to(dtype))
    return None if scale is None else float(scale)


def _by_rules(source, decided_by: str) -> Layout:
    layout = Layout(decided_by=decided_by, explicit_skip=True)
    for name, info in source.tensors.items():
        layout.modules[name] = name
        module = name.removesuffix(".weight")
        if name == module or len(info.shape) != 2:
            continue
        if not may_be_linear(module) or min(info.shape) < _RULES_MIN_FEATURES:
            layout.default_skip.append(module)
            continue
        layout.linears[name] = Linear(name, module, *info.shape)
        layout.candidates.append(module)
    return layout


def _check_converts(source, layout: Layout, model_class) -> None:
    if all(layout.skipped(name, None) for name in layout.candidates):
        found = f" (its layers are {', '.join(layout.linear_kinds)})" if layout.linear_kinds else ""
        raise CheckpointError(
            f"{source.label}: transformers converts no Linear of {model_class.__name__}{found}, so a quantized checkpoint "
            "of it would not load there",
            "For another loader that can read it, pass --set modules=rules: names and shapes then decide.",
        )


def tied_groups(ties: Mapping[str, str]) -> dict[str, set[str]]:
    """Maps each tied parameter to its group: all parameters that share its weight, itself included. Any of them may be stored.

    `ties` maps a parameter to the one that it is tied to, as transformers' `all_tied_weights_keys` does.
    """
    groups: dict[str, set[str]] = {}
    for name, other in ties.items():
        joined = groups.get(name, {name}) | groups.get(other, {other})
        groups |= dict.fromkeys(joined, joined)
    return groups


@contextmanager
def modules_within(source) -> Iterator[None]:
    """Stops the building of a model that has far more modules than there are tensors. It would fill the memory."""
    from torch.nn.modules.module import register_module_module_registration_hook

    tensors = len(source.tensors)
    most, count = _MODULES_A_TENSOR * tensors + _MODULES_AT_LEAST, 0

    def watch(module, name, submodule) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError(f"its numbers make more than {most:,} modules, but the checkpoint holds {tensors:,} tensors")

    handle = register_module_module_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def reason(error: Exception) -> str:
    """The first line of an error's message that says more than the error's type. The type where there is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    detail = lines[0] if len(lines) == 1 or not lines[0].endswith(":") else f"{lines[0]} {lines[1]}"
    return f"{type(error).__name__}: {detail}" if isinstance(error, (KeyError, IndexError, AttributeError)) else detail
