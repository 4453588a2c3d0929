"""Low-rank adapters on a model in memory. PEFT owns the modules and the files; this module is all that knows PEFT.

PEFT lets a library bring its own adapter layer for its own modules (`LoraConfig._register_custom_module`, which PEFT's maintainers
recommend and call experimental). Ours computes in the dtype of its input where PEFT's casts every input to float32, folds the
scaling into the narrow product, and adds the wide one onto the base's result as it is made. Weights of adapters are float32. Files
are plain PEFT.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from qcli.errors import UsageError
from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit
from qcli.nn.linear_groups import LinearGroups
from qcli.nn.linear_table import LinearTable
from qcli.nn.low_rank import LowRank
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.streaming.units import find_units

ALL_LINEAR = "all-linear"
_KINDS = (Linear4bit, Linear8bit, LinearGroups, LinearTable)


class LoraLinear(PeftLinear):
    """y = base(x) + scaling B A x, for a base of qcli.nn or nn.Linear, in x's dtype. A [rank, in] and B [out, rank] are float32."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x [..., in_features] to [..., out_features]."""
        result = self.base_layer(x)
        if self.disable_adapters:
            return result
        rows = result.view(-1, result.shape[-1])
        for name in self.active_adapters:
            if name in self.lora_A:
                narrow = linear(self.lora_dropout[name](x), self.lora_A[name].weight.to(x.dtype)) * self.scaling[name]
                rows = torch.addmm(rows, narrow.view(-1, narrow.shape[-1]), self.lora_B[name].weight.to(x.dtype).t())
        return rows.view(result.shape)

    @property
    def lora_variants(self) -> dict:
        """LoRA and rsLoRA, which need nothing; PEFT itself refuses the others."""
        return {(): None}

    def merge(self, *args, **kwargs) -> None:
        """Raises: what is quantized cannot take the product of an adapter."""
        raise NotImplementedError("the base is quantized: use qcli merge")

    def unmerge(self) -> None:
        """Raises, as `merge` does."""
        raise NotImplementedError("the base is quantized: use qcli merge")

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT would give adapters the dtype of the base's weight, which may be an 8-bit float."""
        device = device or next(self.base_layer.parameters()).device
        for layers in (self.lora_A, self.lora_B):
            layers[adapter_name].to(device, torch.float32)


def linear_modules(model: nn.Module) -> list[str]:
    """The names of all linear modules in the blocks of a causal language model, quantized or not: all but the head."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    inside = {id(module) for unit in find_units(decoder) if unit.index is not None for module in unit.module.modules()}
    head = model.get_output_embeddings()
    kinds = (QuantizedLinear, nn.Linear, Conv1D)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and id(m) in inside and m is not head]


def targets_of(names: Sequence[str], asked: str) -> list[str]:
    """The modules of `names` that get adapters. `asked` is ALL_LINEAR, or full or last names with commas. Raises UsageError."""
    if asked == ALL_LINEAR:
        return list(names)
    found: set[str] = set()
    for part in filter(None, (part.strip() for part in asked.split(","))):
        these = {name for name in names if name == part or name.endswith(f".{part}")}
        if not these:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise UsageError(f"--target {part!r} matches no linear module", f"The model has {known}.")
        found |= these
    if not found:
        raise UsageError(f"--target is {asked!r}, expected {ALL_LINEAR} or names with commas")
    return [name for name in names if name in found]


def short_names(targets: Sequence[str], names: Sequence[str]) -> list[str]:
    """`targets` by their last names, where these match no other module; else by their full names."""
    last = {name.rpartition(".")[2] for name in targets}
    matched = [name for name in names if name.rpartition(".")[2] in last]
    return sorted(last) if set(matched) == set(targets) else list(targets)


def attach(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    rank: int = 16,
    alpha: float = 32.0,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
) -> PeftModel:
    """Puts adapters on the modules `targets` of `model`, or on all linear ones but the head, in place. B is zero, A is drawn from
    `seed`, and all else is frozen."""
    targets = linear_modules(model) if targets is None else targets
    everything = [name for name, _ in model.named_modules()]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=short_names(targets, everything),
        task_type="CAUSAL_LM",
    )
    config._register_custom_module({kind: LoraLinear for kind in (*_KINDS, nn.Linear)})
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # it finds the sizes all the same
        warnings.simplefilter("ignore", FutureWarning)  # between PEFT and transformers
        return get_peft_model(model, config)


@contextmanager
def as_generated(model: nn.Module) -> Iterator[None]:
    """While this lasts, `model` has its adapters as `qcli generate --adapter` has them: as hooks, which decoding steps know."""
    adapted = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]
    handles = []
    try:
        for name, module in adapted:
            (adapter,) = module.active_adapters
            a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
            model.set_submodule(name, module.base_layer)
            handles.append(module.base_layer.register_forward_hook(LowRank(a, b * module.scaling[adapter])))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in adapted:
            model.set_submodule(name, module)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_adapter(model: PeftModel, folder: Path, base: str, revision: str | None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into `folder`. `base` is the hub id or the absolute folder of the
    model below, as PEFT looks for it."""
    for config in model.peft_config.values():
        config.base_model_name_or_path, config.revision = base, revision
    model.save_pretrained(str(folder), save_embedding_layers=False)
    readme = folder / "README.md"  # PEFT's own says nothing
    readme.unlink(missing_ok=True)
    _sort_targets(folder / "adapter_config.json")


def apply_umask(folder: Path) -> None:
    """Gives files the modes that others have: safetensors and PEFT write some as 0600."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _sort_targets(path: Path) -> None:
    """PEFT writes a set: the order of its names would differ from run to run."""
    config = json.loads(path.read_text())
    if isinstance(config.get("target_modules"), list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
