"""What fits given GPUs: the largest model like Llama 3 under each method, and which of the well-known models.

The well-known ones stand in model/known_models.json: of their published config.json files what bears on memory.
"""

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qcli.memory.components import Costs, Setting
from qcli.memory.costs.quantizing import refusal
from qcli.memory.estimate import DEFAULT_CONTEXT, at_least_one, devices_of, method_names
from qcli.memory.model import opening
from qcli.memory.model.config import ModelConfig
from qcli.memory.model.like_llama import largest_llama
from qcli.memory.model.opening import Model
from qcli.memory.model.parameters import parameters
from qcli.memory.placing import verdict
from qcli.memory.placing.hardware import Gpu
from qcli.memory.placing.split import STACK_PREFIX
from qcli.memory.placing.verdict import FITS, Needs
from qcli.schemes import QUANTIZED

_DTYPE = "bfloat16"  # of what is not quantized
_METHODS = ("16", "8", "4")
_READ = "a shape like Llama's"


@dataclass(frozen=True)
class Largest:
    """The largest model like Llama 3 that fits under `method`, with the most overhead. `model` and `needs` are None where none
    fits."""

    method: str
    model: Model | None = None
    needs: Needs | None = None


@dataclass(frozen=True)
class Verdict:
    """A known model under one method. `verdict` is "fits", "tight" or "does not fit", as qcli.memory.placing.verdict defines them.
    `left` is bytes on the fullest GPU."""

    method: str
    needs: Needs
    verdict: str
    left: int


@dataclass(frozen=True)
class Known:
    """A well-known model with `context` tokens: as many as were asked for, or its own limit if that is less."""

    model: Model
    context: int
    verdicts: list[Verdict]


@dataclass(frozen=True)
class WhatFits:
    """`largest` has a row for each method. `known` has one for each model, the smallest first. `notes` are sentences."""

    setting: Setting
    gpus: list[Gpu]
    largest: list[Largest]
    known: list[Known]
    notes: list[str]

    @property
    def fits(self) -> bool:
        """Whether anything fits."""
        verdicts = [each.verdict for row in self.known for each in row.verdicts]
        return FITS in verdicts or any(row.model for row in self.largest)


@cache
def known_models() -> list[Model]:
    """The well-known models, the smallest first."""
    raw = json.loads(Path(opening.__file__).with_name("known_models.json").read_text())
    found = [_model(ModelConfig(fields, name), name, "the published config") for name, fields in raw.items()]
    return sorted(found, key=lambda model: model.parameter_count)


def what_fits(
    gpu: Sequence[str],
    *,
    context: int | None = None,
    batch: int = 1,
    bits: Sequence[str] = (),
    kv_dtype: str | None = None,
    runtime: str = "transformers",
) -> WhatFits:
    """What fits the GPUs in `gpu`: sizes or names, as `--gpu` takes them, at least one. The other arguments are those of
    `estimate_memory`. `bits` are 16, 8 and 4 by default.

    Raises UsageError, DeviceError.
    """
    at_least_one(context=context, batch=batch)
    devices = devices_of(gpu, runtime)
    setting = Setting(context or DEFAULT_CONTEXT, batch, _DTYPE, kv_dtype, runtime, train=None, rank=0)
    methods = method_names(bits or _METHODS, _DTYPE)
    largest = [_largest(method, setting, devices) for method in methods]
    known = [_known(model, methods, setting, devices) for model in known_models()]
    return WhatFits(setting, devices, largest, known, _notes(methods, setting, devices))


def _largest(method: str, setting: Setting, devices: Sequence[Gpu]) -> Largest:
    shallow: dict[tuple[int, bool], Costs] = {}

    def fits(config: ModelConfig) -> bool:
        shape = config.hidden_size, config.tied_embeddings
        if shape not in shallow:
            one = ModelConfig(config.raw | {"num_hidden_layers": 1}, config.label)
            shallow[shape] = Costs(_model(one, one.label, _READ), method, setting.dtype)
        return verdict.fits(deepened(shallow[shape], config).needs(setting, devices), devices)

    config = largest_llama(fits)
    if config is None:
        return Largest(method)
    model = _model(config, config.label, _READ)
    return Largest(method, model, _needs(model, method, setting, devices))


def deepened(costs: Costs, config: ModelConfig) -> Costs:
    """The costs of `config`, from the costs of the same model with one layer.

    All its layers are alike. Counting each of them, in every shape that is tried, would take minutes.
    """
    layer = next(block for block in costs.blocks if block.name.startswith(STACK_PREFIX))
    found = copy(costs)
    found.model = replace(costs.model, config=config)
    found.blocks = []
    for block in costs.blocks:
        if block is layer:
            found.blocks += [replace(layer, name=f"{STACK_PREFIX}{index}") for index in range(config.layers)]
        else:
            found.blocks.append(block)
    found.weights = replace(costs.weights, total=sum(block.weights for block in found.blocks))
    return found


def _known(model: Model, methods: Sequence[str], setting: Setting, devices: Sequence[Gpu]) -> Known:
    context = min(setting.context, model.config.max_context or setting.context)
    verdicts = []
    for method in methods:
        needs = _needs(model, method, replace(setting, context=context), devices)
        placement = verdict.place(needs, devices, None)
        verdicts.append(Verdict(method, needs, placement.verdict, placement.left))
    return Known(model, context, verdicts)


def _needs(model: Model, method: str, setting: Setting, devices: Sequence[Gpu]) -> Needs:
    return Costs(model, method, setting.dtype).needs(setting, devices)


def _model(config: ModelConfig, label: str, read: str) -> Model:
    return Model(label, config, parameters(config), read)


def _notes(methods: Sequence[str], setting: Setting, devices: Sequence[Gpu]) -> list[str]:
    found = []
    fused = [model.label for model in known_models() if any(p.kind == "experts" for p in model.parameters)]
    if any(method in QUANTIZED for method in methods):
        found.append(f"Experts are fused parameters, which transformers 5 leaves in {_DTYPE}: those of {', '.join(fused)}.")
    refused = ((model, refusal(model.parameters, method)) for method in methods for model in known_models())
    found += [f"{model.label}: {reason}." for model, reason in refused if reason is not None]
    if setting.runtime == "vllm" and len(devices) > 1:
        found.append("Over several GPUs the layers are split as by vLLM's pipeline parallelism, not within each layer.")
    return found


def summary(found: WhatFits) -> dict[str, object]:
    """For JSON. Sizes are bytes. A later version may add keys, and changes none.

    setting: context, batch, dtype, kv_dtype, runtime.
    gpus: name, memory, said (a sentence on where the memory is from).
    fits: whether anything fits. notes: sentences.
    largest: for each method, method, parameters, layers, hidden_size, intermediate_size, heads, kv_heads, vocab_size,
    tied_embeddings, and total (least, likely, most, on one GPU). All but method are null where no model fits.
    models: for each model, name, type, parameters, context (the tokens that it was counted with), and methods: for each method,
    method, verdict ("fits", "tight", "does not fit"), left (on the fullest GPU), and total.
    """
    asked = vars(found.setting)
    return {
        "setting": {name: asked[name] for name in ("context", "batch", "dtype", "kv_dtype", "runtime")},
        "gpus": [vars(gpu) for gpu in found.gpus],
        "fits": found.fits,
        "notes": found.notes,
        "largest": [_largest_summary(row) for row in found.largest],
        "models": [
            {
                "name": row.model.label,
                "type": row.model.config.model_type,
                "parameters": row.model.parameter_count,
                "context": row.context,
                "methods": [
                    {"method": each.method, "verdict": each.verdict, "left": each.left, "total": each.needs.totals}
                    for each in row.verdicts
                ],
            }
            for row in found.known
        ],
    }


_SHAPE = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "vocab_size", "tied_embeddings")


def _largest_summary(row: Largest) -> dict[str, object]:
    if row.model is None or row.needs is None:
        return {"method": row.method, "parameters": None} | dict.fromkeys((*_SHAPE, "total"))
    shape = {name: getattr(row.model.config, name) for name in _SHAPE}
    return {"method": row.method, "parameters": row.model.parameter_count} | shape | {"total": row.needs.totals}
