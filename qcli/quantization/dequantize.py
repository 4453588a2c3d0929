"""The verb `dequantize`: a quantized checkpoint in, the same model in 16 or 32 bits out.

Each weight becomes what its format's own library makes of it: the values of its codes, rounded once. Module after module is read,
decoded and written, so memory holds a few tensors. A run that was stopped goes on where it stopped.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from qcli import __version__, formats
from qcli.checkpoint import dtypes
from qcli.checkpoint.config_json import parts
from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Layout
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
from qcli.quantization.plan import Output, Plan, Work
from qcli.quantization.room import check_output
from qcli.quantization.staging import Staging
from qcli.recipe import KEEP, Choice, Recipe

_SHARD_BYTES = 5_000_000_000


class Decoding(Plan):
    """A plan whose work decodes. `stored` maps tensors of codes to what is stored of their modules, `names` to the tensors of each
    attribute. The weights of `transposed` are [in_features, out_features] in the model."""

    stored: Mapping[str, Stored]
    transposed: set[str]
    names: Mapping[str, Mapping[str, str]]

    def decoded(self, tensor: str) -> torch.Tensor:
        """The weight float32 [out_features, in_features] whose codes are `tensor`. Raises CheckpointError, HubError."""
        tensors = {attribute: read_tensor(self.source, self.source.tensors[name]) for attribute, name in self.names[tensor].items()}
        return decode(self.stored[tensor], tensors)

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


Kind = TypeVar("Kind", bound=Decoding)


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
    if not source.quantization:
        raise CheckpointError(f"{source.label} is not quantized", "Give a quantized checkpoint.")
    target = Path(output) if output is not None else Path(f"{source.name}-dequantized")
    plan = plan_decoding(Decoding, source, *format_and_layout(source), target, dtype)
    check_output(plan, overwrite)
    plan.check()
    with Staging(plan, overwrite=overwrite) as staging:
        other_files.carry_over(plan, staging)
        done = sum(plan.work[i].info.nbytes for i in staging.done)
        with shown(progress, plan.source_bytes, done) as advance:
            execute(plan, staging, torch.device("cpu"), advance, decoding_tasks)
        write_rest(plan, staging, _provenance(plan))
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


def write_rest(plan: Decoding, staging: Staging, provenance: Mapping[str, object]) -> None:
    """Writes what follows the weights, config.json last, and compares the folder with the plan. Raises CheckpointError."""
    if plan.index is not None:
        staging.add_file("model.safetensors.index.json", plan.index)
    staging.add_file("qcli.json", other_files.as_json(provenance))
    staging.add_file("config.json", other_files.as_json(plan.config))
    verify(plan, staging.folder)


def format_and_layout(source: Source) -> tuple[formats.Format, Layout]:
    """The format of a checkpoint, for an unquantized one any, and its modules. Raises CheckpointError, PlanError."""
    if source.problems:
        raise PlanError(source.label, source.problems, source.again())
    stated = source.quantization
    format = formats.of_config(stated) if stated else formats.get(formats.NAMES[0])
    if format is None:
        kind = (stated or {}).get("quant_method", "an unnamed method")
        known = ", ".join((*formats.NAMES, *formats.READ_ONLY))
        raise CheckpointError(f"{source.label} is quantized by {kind}, which qcli does not read; it reads {known}")
    if stated:
        format.check(stated, f"{source.label}/config.json: quantization_config")
    built, config = transformers_class(source, source.trusted)
    if built is None:
        raise CheckpointError(f"{source.label}: transformers does not know its architecture", "Install a newer transformers.")
    return format, model_layout(source, built, config, format.weight_name)


def plan_decoding(
    kind: type[Kind],
    source: Source,
    format: formats.Format,
    layout: Layout,
    output: Path,
    dtype: str,
    beside: Mapping[str, str] | None = None,
) -> Kind:
    """A plan of `kind` that writes every weight of `source` in `dtype`. `beside` maps stored tensors of weights to the name of a
    second one that is to be made of them."""
    linears = layout.linears | ({layout.head.linear.tensor: layout.head.linear} if layout.head else {})
    stored = format.read(source, list(linears.values()), source.quantization) if source.quantization else {}
    by_codes = {tensor: stored[linear.module] for tensor, linear in linears.items() if linear.module in stored}
    companions = format.companions(source.tensors) if source.quantization else {}
    problems = []
    if lost := sorted(
        owner for owner in set(companions.values()) - set(by_codes) if source.tensors[owner].dtype not in dtypes.FLOATS
    ):
        problems.append(together("quantized tensors that are no linear modules of the model", lost))
    code = model_dtype(source, dtype)
    planned = []
    order = {file: i for i, file in enumerate(source.files)}
    for info in sorted(source.tensors.values(), key=lambda info: (order[info.file], info.start)):
        if info.name in by_codes:
            linear = linears[info.name]
            shape = linear.out_features, linear.in_features
            spec = TensorSpec(format.weight_name(info.name), code, shape[::-1] if linear.transposed else shape)
        elif info.name in companions:
            continue
        else:
            spec = TensorSpec(
                info.name, _unquantized_dtype(info.dtype, layout.stays_fp32(info.name, code), code), tuple(info.shape)
            )
        second = () if beside is None or info.name not in beside else (replace(spec, name=beside[info.name]),)
        planned.append(Planned(info, None, None, (spec, *second)))
    work, shards = outputs.place_outputs(planned, _SHARD_BYTES, format)
    recipe = Recipe(Choice(KEEP))
    plan = kind(source, recipe, format, layout.decided_by, output, code, dtypes.TORCH_NAMES[code], {}, work, shards)
    plan.problems += problems
    plan.stored = by_codes
    plan.transposed = {tensor for tensor, linear in linears.items() if linear.transposed}
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


def decoding_tasks(
    plan: Decoding, staging: Staging, device: torch.device, advance: Callable[[int, str], None], fd: int, work: Work, absmax: float
) -> Iterator[Callable[[], None]]:
    """The tasks of a piece of work, for `execute`."""
    if work.info.name in plan.stored:
        yield partial(_decode, plan, staging, advance, work)
    else:
        yield from WorkTasks(plan, staging, device, advance, fd, work, absmax).tasks()


def _decode(plan: Decoding, staging: Staging, advance: Callable[[int, str], None], work: Work) -> None:
    """Decodes one module."""
    (output,) = work.outputs
    write_weight(plan, staging, work, output, plan.decoded(work.info.name))
    advance(work.info.nbytes, work.info.name)
    staging.finish_work(work.index, ErrorSums())


def write_weight(plan: Decoding, staging: Staging, work: Work, output: Output, weight: torch.Tensor) -> None:
    """Writes a weight [out_features, in_features] as `output`, one of those of `work`, rounded once."""
    weight = weight.to(dtypes.torch_dtype(output.dtype))
    if work.info.name in plan.transposed:
        weight = weight.t()
    data: Any = weight.contiguous().view(-1).view(torch.uint8).numpy().data
    staging.write(output.file, output.start, data)
