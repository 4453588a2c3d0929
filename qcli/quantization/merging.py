"""The plan of a merge, and its work: each weight of an adapted module gets the product of its matrices, in float32."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from qcli import __version__
from qcli.checkpoint import dtypes
from qcli.checkpoint.carried import is_chat_template
from qcli.checkpoint.config_json import parts
from qcli.checkpoint.layout import Layout
from qcli.checkpoint.source import Source
from qcli.errors import NonFiniteError, together
from qcli.loading.adapter import Adapter
from qcli.methods.errors import ErrorSums
from qcli.quantization.decoding import read_tensor
from qcli.quantization.dequantize import Decoding, decoding_tasks, format_and_layout, plan_decoding, write_weight
from qcli.quantization.plan import Work
from qcli.quantization.staging import Staging

_PANEL = 1 << 22  # elements of a change in float32 at a time


class Merging(Decoding):
    """A plan whose work adds an adapter. `merged` maps stored tensors of weights to the modules whose matrices they get; of one in
    `untied` the second output gets them, the first stays. `stated` is what the output says that it was made from."""

    adapter: Adapter
    stated: Source
    merged: Mapping[str, str]
    untied: set[str]

    @cached_property
    def config(self) -> dict[str, object]:
        """config.json of the output."""
        found = super().config
        if self.untied:
            for _, part in parts(found):
                if part is found or "tie_word_embeddings" in part:
                    part["tie_word_embeddings"] = False
        return found

    @cached_property
    def identity(self) -> dict[str, object]:
        """See Plan."""
        dtype = dtypes.TORCH_NAMES[self.dtype]
        return {"qcli": __version__, "source": self.source.fingerprint, "adapter": self.adapter.fingerprint, "merge": dtype}


def plan_merging(source: Source, adapter: Adapter, output: Path) -> Merging:
    """The plan that writes `source`, an unquantized or quantized checkpoint, with `adapter` in its weights. The tokenizer and the
    chat template beside the adapter take the place of the source's. Raises CheckpointError, PlanError."""
    format, layout = format_and_layout(source)
    tensors, untied = _tensors(layout, adapter, source.label)
    beside = {tensor: f"{adapter_module}.weight" for tensor, adapter_module in tensors.items() if tensor in untied}
    plan = plan_decoding(Merging, source, format, layout, output, "auto", beside)
    plan.adapter, plan.stated, plan.merged, plan.untied = adapter, source, tensors, untied
    if wrong := [name for name in tensors if name not in plan.stored and source.tensors[name].dtype not in dtypes.FLOATS]:
        plan.problems.append(together("weights to change that are stored as neither floats nor codes", wrong))
    own = adapter.tokenizer_files
    if own:
        templates = any(map(is_chat_template, own)) or "chat_template" in _tokenizer_config(adapter)
        kept = [name for name in source.carried.files if name not in own and not (templates and is_chat_template(name))]
        source.carried = replace(source.carried, files=kept)
    return plan


def _tokenizer_config(adapter: Adapter) -> dict[str, Any]:
    return adapter.json("tokenizer_config.json") if "tokenizer_config.json" in adapter.place.names else {}


def _tensors(layout: Layout, adapter: Adapter, label: str) -> tuple[dict[str, str], set[str]]:
    """(stored tensor to adapted module, tensors of embeddings whose tied head is adapted). Raises CheckpointError."""
    found = {linear.module: linear for linear in layout.linears.values()}
    untied = set()
    if layout.head is not None and layout.head.tied and layout.head.module in adapter.pairs:
        found[layout.head.module] = layout.head.linear
        untied.add(layout.head.linear.tensor)
    adapter.check_fits({name: (linear.out_features, linear.in_features) for name, linear in found.items()}, label)
    return {found[module].tensor: module for module in adapter.pairs}, untied


def merging_tasks(
    plan: Merging, staging: Staging, device: torch.device, advance: Callable[[int, str], None], fd: int, work: Work, absmax: float
) -> Iterator[Callable[[], None]]:
    """The tasks of a piece of work, for `execute`."""
    if work.info.name in plan.merged:
        yield partial(_merge, plan, staging, advance, work)
    else:
        yield from decoding_tasks(plan, staging, device, advance, fd, work, absmax)


def _merge(plan: Merging, staging: Staging, advance: Callable[[int, str], None], work: Work) -> None:
    """Merges one module."""
    name, source = work.info.name, plan.source
    if name in plan.stored:
        weight = plan.decoded(name)
    else:
        weight = read_tensor(source, work.info).float()
        weight = weight.t() if name in plan.transposed else weight
    if name in plan.untied:
        write_weight(plan, staging, work, work.outputs[0], weight)
    sums = add(weight, *plan.adapter.matrices(plan.merged[name]))
    output = work.outputs[-1]
    if not weight.to(dtypes.torch_dtype(output.dtype)).isfinite().all():
        raise NonFiniteError(
            f"{plan.merged[name]}: the merged weight has values that {dtypes.TORCH_NAMES[output.dtype]} cannot hold",
            "A weight of the base is damaged, or the adapter's scaling is far too large.",
        )
    write_weight(plan, staging, work, output, weight)
    advance(work.info.nbytes, name)
    staging.finish_work(work.index, sums)


def add(weight: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> ErrorSums:
    """weight += b a, in panels of rows: all float32. Returns the squared norms of what is added and of what was there."""
    sums, rows = ErrorSums(), max(_PANEL // weight.shape[1], 1)
    for panel, part in zip(weight.split(rows), b.split(rows)):
        change = part @ a
        sums.squared_error += float(change.square().sum(dtype=torch.float64))
        sums.squared_norm += float(panel.square().sum(dtype=torch.float64))
        panel += change
    return sums
