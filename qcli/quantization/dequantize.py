"""The verb `dequantize`: a quantized checkpoint in, the same model in 16 or 32 bits out.

Each weight becomes what its format's own library makes of it: the values of its codes, rounded once. Module after module is read,
decoded and written, so memory holds a few tensors. A run that was stopped goes on where it stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from qcli import __version__, formats
from qcli.checkpoint import dtypes
from qcli.checkpoint.config_json import parts
from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.model_dtype import model_dtype
from qcli.checkpoint.modules import model_layout, transformers_class
from qcli.checkpoint.source import Source, open_source
from qcli.errors import CheckpointError, PlanError, one_of, together
from qcli.formats import Stored
from qcli.methods.errors import ErrorSums
from qcli.process import peak_memory
from qcli.progress import Progress, shown
from qcli.quantization import other_files, outputs
from qcli.quantization.decoding import decode, read_tensor
from qcli.quantization.execute import WorkTasks, execute, verify
from qcli.quantization.outputs import Planned
from qcli.quantization.plan import Plan, Work
from qcli.quantization.quantize import check_output
from qcli.quantization.staging import Staging
from qcli.recipe import KEEP, Choice, Recipe

_SHARD_BYTES = 5_000_000_000


class Decoding(Plan):
    """A plan whose work decodes. `stored` maps tensors of codes to what is stored of their modules, `names` to the tensors of each
    attribute. The weights of `transposed` are [in_features, out_features] in the model."""

    stored: Mapping[str, Stored]
    transposed: set[str]
    names: Mapping[str, Mapping[str, str]]

    @cached_property
    def config(self) -> dict[str, object]:
        """config.json of the output."""
        found = super().config
        for _, part in parts(found):
            part.pop("quantization_config", None)
        return found

    @cached_property
    def identity(self) -> dict[str, object]:
        """See Plan."""
        return {"qcli": __version__, "source": self.source.fingerprint, "dequantize": dtypes.TORCH_NAMES[self.dtype]}

    @cached_property
    def parameters(self) -> int:
        return sum(sum(spec.end - spec.start for spec in w.outputs) // dtypes.ITEMSIZE[self.dtype] for w in self.work)


@dataclass
class Dequantized:
    """What a run did. Sizes are bytes of weights."""

    output: str
    modules: int
    dtype: str
    source_bytes: int
    output_bytes: int
    seconds: float
    peak_memory: int

    def summary(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


def dequantize(
    model: str,
    output: str | Path | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Dequantized:
    """Writes the quantized `model`, a folder or hub id in any format that qcli reads, as a plain checkpoint of `dtype`: auto is
    that of the config, bfloat16 where it names none.

    Raises UsageError, CheckpointError for what is not quantized or cannot be decoded, PlanError for what stands against writing,
    HubError. After any of them no folder stands under the final name, and the same call goes on where it stopped.
    """
    one_of("dtype", dtype, ("auto", *dtypes.MODEL_DTYPES))
    started = time.monotonic()
    source = open_source(model, revision, trust_remote_code=trust_remote_code)
    plan = _plan(source, Path(output) if output is not None else Path(f"{source.name}-dequantized"), dtype)
    check_output(plan, overwrite)
    plan.check()
    with Staging(plan, overwrite=overwrite) as staging:
        other_files.carry_over(plan, staging)
        done = sum(plan.work[i].info.nbytes for i in staging.done)
        with shown(progress, plan.source_bytes, done) as advance:
            execute(plan, staging, torch.device("cpu"), advance, _tasks)
        if plan.index is not None:
            staging.add_file("model.safetensors.index.json", plan.index)
        staging.add_file("qcli.json", other_files.as_json(_provenance(plan)))
        staging.add_file("config.json", other_files.as_json(plan.config))
        verify(plan, staging.folder)
        staging.publish()
    return Dequantized(
        str(plan.output),
        len(plan.stored),
        dtypes.TORCH_NAMES[plan.dtype],
        sum(info.nbytes for info in source.tensors.values()),
        plan.output_bytes,
        time.monotonic() - started,
        peak_memory(),
    )


def _provenance(plan: Decoding) -> dict[str, object]:
    """What qcli.json says: where the weights come from."""
    source = plan.source
    label = source.label if source.is_hub else source.name
    return {
        "qcli": __version__,
        "source": {"name": label, "revision": source.revision, "fingerprint": source.fingerprint},
        "dequantized_from": plan.format.name,
        "dtype": dtypes.TORCH_NAMES[plan.dtype],
    }


def _plan(source: Source, output: Path, dtype: str) -> Decoding:
    if not source.quantization:
        raise CheckpointError(f"{source.label} is not quantized", "Give a quantized checkpoint.")
    if source.problems:
        raise PlanError(source.label, source.problems, source.again())
    format = formats.of_config(source.quantization)
    if format is None:
        kind = source.quantization.get("quant_method", "an unnamed method")
        known = ", ".join((*formats.NAMES, *formats.READ_ONLY))
        raise CheckpointError(f"{source.label} is quantized by {kind}, which qcli does not read; it reads {known}")
    format.check(source.quantization, f"{source.label}/config.json: quantization_config")
    built, config = transformers_class(source, source.trusted)
    if built is None:
        raise CheckpointError(f"{source.label}: transformers does not know its architecture", "Install a newer transformers.")
    layout = model_layout(source, built, config, format.weight_name)
    linears = layout.linears | ({layout.head.linear.tensor: layout.head.linear} if layout.head else {})
    stored = format.read(source, list(linears.values()), source.quantization)
    by_codes = {tensor: stored[linear.module] for tensor, linear in linears.items() if linear.module in stored}
    beside = format.companions(source.tensors)
    problems = []
    if lost := sorted(owner for owner in set(beside.values()) - set(by_codes) if source.tensors[owner].dtype not in dtypes.FLOATS):
        problems.append(together("quantized tensors that are no linear modules of the model", lost))
    code = model_dtype(source, dtype)
    planned = []
    order = {file: i for i, file in enumerate(source.files)}
    for info in sorted(source.tensors.values(), key=lambda info: (order[info.file], info.start)):
        if info.name in by_codes:
            linear = linears[info.name]
            shape = linear.out_features, linear.in_features
            spec = TensorSpec(format.weight_name(info.name), code, shape[::-1] if linear.transposed else shape)
        elif info.name in beside:
            continue
        else:
            spec = TensorSpec(
                info.name, _unquantized_dtype(info.dtype, layout.stays_fp32(info.name, code), code), tuple(info.shape)
            )
        planned.append(Planned(info, None, None, (spec,)))
    work, shards = outputs.place_outputs(planned, _SHARD_BYTES, format)
    recipe = Recipe(Choice(KEEP))
    plan = Decoding(source, recipe, format, layout.decided_by, output, code, dtypes.TORCH_NAMES[code], {}, work, shards)
    plan.problems += problems
    plan.stored = by_codes
    plan.transposed = {tensor for tensor in by_codes if linears[tensor].transposed}
    plan.names = {tensor: _names(source, format, tensor, by_codes[tensor]) for tensor in by_codes}
    return plan


def _unquantized_dtype(stored: str, stays_fp32: bool, code: str) -> str:
    if stored not in dtypes.FLOATS:
        return stored
    return "F32" if stays_fp32 else code


def _names(source: Source, format: formats.Format, codes: str, stored: Stored) -> dict[str, str]:
    """Attribute to stored tensor of a module."""
    owned = [codes, *(name for name, owner in format.companions(source.tensors).items() if owner == codes)]
    module = format.weight_name(codes).removesuffix("weight")
    found = {format.attribute(name.removeprefix(module)): name for name in owned}
    return {attribute: found[attribute] for attribute in stored.tensors if attribute in found}


def _tasks(
    plan: Decoding, staging: Staging, device: torch.device, advance: Callable[[int, str], None], fd: int, work: Work, absmax: float
) -> Iterator[Callable[[], None]]:
    if work.info.name in plan.stored:
        yield partial(_decode, plan, staging, advance, work)
    else:
        yield from WorkTasks(plan, staging, device, advance, fd, work, absmax).tasks()


def _decode(plan: Decoding, staging: Staging, advance: Callable[[int, str], None], work: Work) -> None:
    """Decodes one module."""
    (output,), source = work.outputs, plan.source
    tensors = {attribute: read_tensor(source, source.tensors[name]) for attribute, name in plan.names[work.info.name].items()}
    stored = plan.stored[work.info.name]
    weight = decode(stored, tensors).to(dtypes.torch_dtype(output.dtype))
    if work.info.name in plan.transposed:
        weight = weight.t()
    data: Any = weight.contiguous().view(-1).view(torch.uint8).numpy().data
    staging.write(output.file, output.start, data)
    advance(work.info.nbytes, work.info.name)
    staging.finish_work(work.index, ErrorSums())
