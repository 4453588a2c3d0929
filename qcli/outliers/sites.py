"""Where activations are measured: the inputs of a block's linear layers. Layers that read the same tensor share a site."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qcli.calibration.reported_columns import ATTENTION_INPUT, FFN_INPUT
from qcli.checkpoint.names import in_attention, in_ffn
from qcli.nn.quantized_linear import QuantizedLinear
from qcli.streaming.run import current_call, same_tensor

ATTENTION_OUTPUT, FFN_OUTPUT, OTHER = "attention output", "ffn output", "other"
RESIDUAL = "residual stream"  # what leaves a block


@dataclass
class Site:
    """An input of linear modules. `modules` are their paths in the block, with `*` for an expert's number."""

    group: str  # path of the modules' parent
    order: int  # of this input among those of the parent
    modules: dict[str, nn.Module] = field(default_factory=dict)
    kind: str = OTHER


def shown_path(path: str) -> str:
    """A module's path in its block, with `*` for an expert's number."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def linear_modules(block: nn.Module) -> dict[str, nn.Module]:
    """The linear modules of a block by path, and fused experts, whose input is that of linear layers."""
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, (nn.Linear, Conv1D, QuantizedLinear)) or (path and _is_fused(module)):
            found[path] = module
    return found


def _is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of several experts as one."""
    return any(p.dim() == 3 for p in module.parameters(recurse=False))


class SiteFinder:
    """Hooks the linear modules of a block and finds the site of each call.

    `seen(site, module, x, first)` is called at every linear layer. `first` says that x is new at this site in this call.
    """

    def __init__(self, block: nn.Module, seen: Callable[[Site, nn.Module, torch.Tensor, bool], None]):
        self.sites: dict[tuple[str, int], Site] = {}
        self._seen, self._call = seen, None
        self._inputs: dict[str, list[torch.Tensor]] = {}  # of this call, by group
        self._handles = [module.register_forward_pre_hook(self._hook(path)) for path, module in linear_modules(block).items()]

    def _hook(self, path: str) -> Callable:
        group = path.rpartition(".")[0]
        shown = shown_path(path)

        def hook(module, args):
            call, x = current_call(), args[0]
            if call is not self._call:
                self._call, self._inputs = call, {}
            inputs = self._inputs.setdefault(group, [])
            order = next((i for i, before in enumerate(inputs) if same_tensor(before, x)), len(inputs))
            first = order == len(inputs)
            if first:
                inputs.append(x)
            key = (shown.rpartition(".")[0], order)
            site = self.sites.setdefault(key, Site(*key))
            site.modules.setdefault(shown, module)
            self._seen(site, module, x, first)

        return hook

    def close(self) -> list[Site]:
        """Removes the hooks and returns the sites with their kinds, in the order of the calls."""
        for handle in self._handles:
            handle.remove()
        self._call, self._inputs = None, {}
        groups: dict[str, list[Site]] = {}
        for site in self.sites.values():
            # Linear layers directly in the block are grouped by their names.
            group = site.group or ("ffn" if in_ffn(next(iter(site.modules))) else "")
            groups.setdefault(group, []).append(site)
        for sites in groups.values():
            _name(sites)
        return list(self.sites.values())


def _name(sites: list[Site]) -> None:
    """Sets the kinds of the inputs of one attention or FFN. Its first layers read the hidden state; the last one makes its
    output."""
    path = next(iter(sites[0].modules))
    if in_ffn(path):
        first, last = FFN_INPUT, FFN_OUTPUT
    elif in_attention(path):
        first, last = ATTENTION_INPUT, ATTENTION_OUTPUT
    else:
        return
    sites[0].kind = first
    if len(sites) > 1:
        fused = all(_is_fused(module) for module in sites[-1].modules.values())
        sites[-1].kind = first if fused else last  # only the input of fused experts is seen
