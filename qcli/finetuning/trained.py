"""What a run trains: low-rank adapters, or (qcli/finetuning/weights.py) the weights of modules themselves.

The run, its plan and its state know no more of it than this: what is put into a model, tensors by name, and a folder at the end.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from qcli.checkpoint.source import Source
from qcli.finetuning import lora
from qcli.finetuning.settings import Options
from qcli.memory.components import Component, Costs
from qcli.memory.costs.training import training
from qcli.quantization.plan import Shard, Work
from qcli.quantization.staging import Staging
from qcli.recipe import Recipe

Target = tuple[str, int, int]  # name, out_features, in_features


class Trained(Protocol):
    """`targets` are the modules that are trained or get adapters. `noun` is what the folder holds. `recipe` quantizes the model as
    it is read. `parameters` counts what is trained. `output_bytes` are those of the folder's weights. `work` and `shards` are what
    is planned ahead of them (see Staged). `notes` are for the plan, and `smaller` are options that take less memory. `next` is the
    command that is to follow, if any."""

    noun: str
    next: str | None
    recipe: Recipe | None
    targets: list[Target]
    parameters: int
    output_bytes: int
    work: Sequence[Work]
    shards: Sequence[Shard]
    notes: list[str]
    smaller: list[str]

    def line(self) -> str:
        """For the plan: what is trained."""
        ...

    def memory(self, costs: Costs, tokens: int, checkpointing: bool, on_gpu: bool) -> list[Component]:
        """The model and all that training adds, for batches of `tokens` tokens. `costs` are those of the model as the recipe of the
        plan quantizes it."""
        ...

    def put_in(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Puts what is trained into `model`, freezes all else, and returns it by name: float32."""
        ...

    def as_generated(self, model: nn.Module) -> AbstractContextManager[None]:
        """While this lasts, decoding steps know the modules of `model`."""
        ...

    def write(self, staging: Staging, values: Mapping[str, torch.Tensor], tokenizer: Any, about: dict[str, object]) -> None:
        """Writes the folder with `values` of what is trained, on the CPU by name. `about` goes into qcli.json."""
        ...

    def card(self) -> tuple[list[str], str]:
        """(lines of the front matter of README.md, its first sentence)."""
        ...


def last_names(targets: Sequence[Target]) -> str:
    """The kinds of modules among `targets`."""
    return ", ".join(sorted({name.rpartition(".")[2] for name, _, _ in targets}))


def base_name(source: Source) -> str:
    """The hub id or the absolute folder of a model."""
    return source.label if source.is_hub else str(Path(source.label).resolve())


class Adapters:
    """Low-rank adapters in PEFT's layout. See Trained."""

    noun, next = "adapter", None
    work: Sequence[Work] = ()
    shards: Sequence[Shard] = ()

    def __init__(self, source: Source, targets: list[Target], options: Options, recipe: Recipe | None):
        self.source, self.targets, self.options, self.recipe = source, targets, options, recipe
        self.parameters = options.rank * sum(out + into for _, out, into in targets)
        self.output_bytes = 4 * self.parameters
        self.notes: list[str] = []
        self.smaller = [] if recipe or source.quantization else ["--bits 4"]

    def line(self) -> str:
        return (
            f"adapters: rank {self.options.rank}, alpha {self.options.alpha:g}, on {len(self.targets):,} modules "
            f"({last_names(self.targets)}): {self.parameters:,} parameters"
        )

    def memory(self, costs: Costs, tokens: int, checkpointing: bool, on_gpu: bool) -> list[Component]:
        shapes = [(out, into) for _, out, into in self.targets]
        found = training(
            costs.model.config, shapes, 0, tokens, rank=self.options.rank, train="finetune", checkpointing=checkpointing
        )
        parts = [Component(name, size, ()) for name, size in found.components.items() if size]
        return [Component("weights", costs.weights.total, ()), *parts]

    def put_in(self, model: nn.Module) -> dict[str, nn.Parameter]:
        options, names = self.options, [name for name, _, _ in self.targets]
        rare = options.rare
        self._adapted = lora.attach(model, names, options.rank, options.alpha, rare.dropout, rare.rslora, options.seed)
        self._parameters = lora.adapter_parameters(model)
        return self._parameters

    def as_generated(self, model: nn.Module) -> AbstractContextManager[None]:
        return lora.as_generated(model)

    def write(self, staging: Staging, values: Mapping[str, torch.Tensor], tokenizer: Any, about: dict[str, object]) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(values[name])
        lora.save_adapter(self._adapted, staging.folder, base_name(self.source), self.source.revision)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokenizer.save_pretrained(str(staging.folder))
        lora.apply_umask(staging.folder)
        staging.add_file("qcli.json", (json.dumps(about, indent=2) + "\n").encode())

    def card(self) -> tuple[list[str], str]:
        base, options = base_name(self.source), self.options
        front = [f"base_model: {base}", "library_name: peft", "tags: [lora, qcli]"]
        return front, (f"A LoRA adapter of {base}, rank {options.rank}, alpha {options.alpha:g}, on {last_names(self.targets)}.")
