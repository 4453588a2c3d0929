"""Training the weights themselves of a model that is to run in LLM.int8(), in the rounding that it will run in.

What is written is the whole model in the dtype it had. `qcli quantize --bits 8` makes of it the model whose loss training saw.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcli.checkpoint.source import Source
from qcli.errors import CheckpointError, UsageError, together
from qcli.finetuning.settings import Options
from qcli.finetuning.trained import Target, base_name, last_names
from qcli.finetuning.trained_linear_8bit import TrainedLinear8bit, linear_8bit
from qcli.memory.components import Component, Costs
from qcli.memory.costs.training import training
from qcli.methods.choosing import made, methods_of
from qcli.methods.errors import ErrorSums
from qcli.ops.quantize_int8 import quantize_int8
from qcli.quantization import other_files
from qcli.quantization.dequantize import Decoding, decoding_tasks, format_and_layout, plan_decoding, write_rest, write_weight
from qcli.quantization.execute import execute
from qcli.quantization.plan import Work
from qcli.quantization.room import check_output
from qcli.quantization.staging import Staging
from qcli.recipe import Choice, Recipe
from qcli.schemes import BY_BITS

_SCALE_BYTES = 4  # of each row


class Weights:
    """The weights of linear modules, each float32 in training. See Trained. Raises UsageError where `recipe` is not LLM.int8() as
    `--bits 8` means it, CheckpointError for a quantized model, PlanError for what stands against the output."""

    noun, recipe = "model", None

    def __init__(
        self,
        source: Source,
        targets: list[Target],
        options: Options,
        recipe: Recipe | None,
        output: Path,
        dtype: str,
        overwrite: bool,
    ):
        if source.quantization:
            raise CheckpointError(
                f"{source.label} is quantized, and train=weights needs the weights it was made from",
                "Give the unquantized model with --bits 8, or leave out train=weights to train adapters.",
            )
        if recipe is None or recipe.head or set(methods_of(recipe)) != {made(Choice(BY_BITS[8]))}:
            raise UsageError(
                "train=weights trains weights in the rounding of LLM.int8(), and nothing asks for that", "Add --bits 8."
            )
        self.source, self.options, self._rounded_by = source, options, recipe
        format, layout = format_and_layout(source)
        self._rounded = {linear.module: linear.tensor for linear in layout.quantizable() if not recipe.choice(linear.module).keeps}
        self.targets = [target for target in targets if target[0] in self._rounded]
        left = [name for name, _, _ in targets if name not in self._rounded]
        if not self.targets:
            raise UsageError(together("qcli quantize --bits 8 leaves these modules as they are", left), "Name others by --target.")
        self._whole = plan_decoding(_Whole, source, format, layout, output, dtype)
        check_output(self._whole, overwrite)
        self._whole.check()
        self.parameters = sum(out * into for _, out, into in self.targets)
        self.output_bytes, self.work, self.shards = self._whole.output_bytes, self._whole.work, self._whole.shards
        self.smaller = ["--target with fewer modules", "train=adapters"]
        self.next = f"qcli quantize {output} --bits 8"
        self.notes = ["the weights themselves are trained: --rank and --alpha do not count"]
        if left:
            self.notes.append(together("left as they are, since qcli quantize --bits 8 leaves them too", left))

    def line(self) -> str:
        return (
            f"weights: those of {len(self.targets):,} modules ({last_names(self.targets)}), rounded to int8 in each pass: "
            f"{self.parameters:,} parameters"
        )

    def memory(self, costs: Costs, tokens: int, checkpointing: bool, on_gpu: bool) -> list[Component]:
        in_int8 = self.parameters + sum(_SCALE_BYTES * out for _, out, _ in self.targets)
        largest = max(out * into for _, out, into in self.targets)
        moments = 8 if self.options.rare.optimizer == "adamw" else 2
        passes = training(costs.model.config, [], 0, tokens, train="finetune", checkpointing=checkpointing).components
        sizes = passes | {  # of adapters, of which there are none, it counts nothing
            "other weights": costs.weights.total - in_int8,
            "trained weights": 4 * self.parameters,
            "their gradients": 4 * self.parameters,
            "AdamW's moments": moments * self.parameters,
            "the best weights so far": 0 if on_gpu else 4 * self.parameters,
            # Blocks that keep their inputs alone make codes again, a few modules at a time.
            "codes": in_int8 // (costs.model.config.layers if checkpointing else 1),
            "one weight rounded, and its gradient": (2 + 2 + 4) * largest,
        }
        return [Component(name, size, ()) for name, size in sizes.items() if size]

    def put_in(self, model: nn.Module) -> dict[str, nn.Parameter]:
        model.requires_grad_(False)
        names = {name for name, _, _ in self.targets}
        found = {}
        for name in self._rounded:
            old = model.get_submodule(name)
            weight = old.weight.detach().t() if isinstance(old, Conv1D) else old.weight.detach()
            new: nn.Module
            if name in names:
                new = TrainedLinear8bit(weight, old.bias, weight.dtype)
                found[f"{name}.weight"] = new.weight
            else:
                new = linear_8bit(quantize_int8(weight.contiguous(), 0.0)[:2], old.bias)
            model.set_submodule(name, new)
        return found

    @contextmanager
    def as_generated(self, model: nn.Module) -> Iterator[None]:
        """See Trained."""
        trained = {name: model.get_submodule(name) for name, _, _ in self.targets}
        try:
            for name, module in trained.items():
                assert isinstance(module, TrainedLinear8bit)
                model.set_submodule(name, module.frozen())
            yield
        finally:
            for name, module in trained.items():
                model.set_submodule(name, module)

    def write(self, staging: Staging, values: Mapping[str, torch.Tensor], tokenizer: Any, about: dict[str, object]) -> None:
        self._whole.values = {self._rounded[name]: values[f"{name}.weight"] for name, _, _ in self.targets}
        staging.begin_anew()  # an earlier run may have been stopped while it wrote other values
        other_files.carry_over(self._whole, staging)
        execute(self._whole, staging, torch.device("cpu"), lambda size, name: None, _tasks)
        write_rest(self._whole, staging, about | {"rounded_in_training": self._rounded_by.summary()})

    def card(self) -> tuple[list[str], str]:
        base = base_name(self.source)
        front = [f"base_model: {base}", "base_model_relation: finetune", "library_name: transformers", "tags: [qcli]"]
        return front, (
            f"{base} with trained weights in {last_names(self.targets)}. In training they were rounded to int8 in each pass: "
            "`qcli quantize --bits 8` makes of this model the one that was measured."
        )


class _Whole(Decoding):
    """A plan that writes a model with other weights: `values` float32 [out_features, in_features], by stored tensor."""

    values: Mapping[str, torch.Tensor]


def _tasks(
    plan: _Whole, staging: Staging, device: torch.device, advance: Callable[[int, str], None], fd: int, work: Work, absmax: float
) -> Iterator[Callable[[], None]]:
    if work.info.name in plan.values:
        yield partial(_write, plan, staging, work)
    else:
        yield from decoding_tasks(plan, staging, device, advance, fd, work, absmax)


def _write(plan: _Whole, staging: Staging, work: Work) -> None:
    (output,) = work.outputs
    write_weight(plan, staging, work, output, plan.values[work.info.name])
    staging.finish_work(work.index, ErrorSums())
