"""On-disk formats. One format is one file here, both ways: what it cannot hold, its tensors, its config, and reading them back.

A format is torch-free to import, since `estimate-memory` asks it for sizes. Methods give parts by role; formats give names and
bytes. Nothing else in qcli knows the name of a stored tensor beside a weight.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Layout, Linear
from qcli.errors import UsageError
from qcli.schemes import NAMED, QUANTIZED, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

# The widest-read first: what holds a recipe where nothing else was asked for.
NAMES = ("bitsandbytes", "compressed-tensors", "gptq", "awq", "qcli")
READ_ONLY = ("fp8", "auto-round")  # which only others write


@dataclass(frozen=True)
class Weight:
    """A weight to be stored: its tensor's name, its shape, and the safetensors code of the dtype that it is quantized from."""

    name: str
    out_features: int
    in_features: int
    dtype: str


class Piece(NamedTuple):
    """Data for the stored tensor `tensor`, from byte `offset` on. With a `stride`, each row of the data begins that many bytes
    after the one before."""

    tensor: str
    offset: int
    data: "torch.Tensor"
    stride: int = 0


@dataclass(frozen=True)
class Stored:
    """A quantized weight as a checkpoint holds it, or is about to.

    `tensors` maps attributes of a module (qcli/nn), of which `weight` has the codes, to dtype code and shape. `nested_offset` is
    the one part that is no tensor of its own in bitsandbytes' format. `compute_dtype` is the torch name of the dtype in which the
    checkpoint asks to compute; None leaves it to the model. `zero_offset` is what GPTQ's format has taken from each zero point.
    """

    format: str
    scheme: Scheme
    out_features: int
    in_features: int
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    nested_offset: float | None = None
    compute_dtype: str | None = None
    zero_offset: int = 0


@dataclass
class Choice:
    """What a recipe has chosen of a model: each quantized module's scheme, by its name in transformers; the model's modules."""

    schemes: Mapping[str, Scheme]
    layout: Layout
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Format(Protocol):
    """One on-disk format."""

    name: str
    """What `format` of a recipe takes and the model card says; `quant_method` of config.json."""
    library: str
    """The package by which transformers reads it."""
    rows_together: int
    """Rows of a weight that share a stored element, so that chunks must not part them."""

    def refuses(self, scheme: Scheme) -> str | None:
        """Why it cannot hold `scheme`, as a sentence; None where it can."""
        ...

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        """Why it cannot hold a weight of this shape in a scheme that it can hold; None where it can."""
        ...

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        """Why it cannot hold modules in these schemes, each of which it can hold, in one model; None where it can."""
        ...

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        """Why it cannot hold an output head in the scheme `head`, beside modules in `others`, as a sentence; None where it can.
        If the head is `tied`, the embedding is stored in that scheme, too."""
        ...

    def layout_of(self, scheme: Scheme) -> str:
        """The name of the format whose modules (qcli/nn) run `scheme`: its own, or that of one with the same tensors."""
        ...

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        """Every tensor that is stored for `weight`, before there is any data."""
        ...

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        """What is stored of the parts of a chunk that begins at element `start`, or of the last parts."""
        ...

    def codes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor":
        """The codes of a weight as a method's encoder gives them, [out_features, in_features] unless blocks are flat, from its
        stored tensors by attribute."""
        ...

    def pairs(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        """The same in 4 bits, unsigned, two a byte, the first in the low bits, uint8 [out_features, in_features / 2], where they
        are stored nearly so; else None."""
        ...

    def planes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        """The same in planes of 64 columns (qcli/packing.py), uint8 [out_features, bytes], where they are stored so; else None."""
        ...

    def scales(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
        """The other parts of a weight, by role: `scale` and `zero_point` of the scheme's `scale_shape`, `global_scale` [1]; and
        where columns do not lie in the order of their groups, `group_of_column` [in_features]."""
        ...

    def file_apart(self, tensor: str) -> str | None:
        """The file in which the stored tensor `tensor` lies where other readers must not meet it: one that the index does not
        name. None where it lies among the others."""
        ...

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        """The `quantization_config` of config.json. What it cannot express goes to the choice's problems, what some reader
        will not like to its notes. `compute_dtype` is a torch name."""
        ...

    def owns(self, config: Mapping[str, object]) -> bool:
        """Whether a `quantization_config` is of this format."""
        ...

    def check(self, config: Mapping[str, Any], label: str) -> None:
        """Checks the fields of a `quantization_config` that is of this format. Raises CheckpointError."""
        ...

    def weight_name(self, tensor: str) -> str:
        """The weight that the stored tensor `tensor` stands for, if it holds the codes of one; else `tensor`."""
        ...

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        """Stored tensor beside a weight's codes (scales, tables) to the tensor of the codes, by names alone."""
        ...

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        """The scheme in which the tensor `codes` is stored, as far as headers and the unchecked `quantization_config` show; None
        where it is not of this format."""
        ...

    def parameters_in(self, info: "TensorInfo", scheme: Scheme, config: Mapping[str, Any] | None) -> int:
        """How many weights the stored tensor of codes stands for, as far as headers and the unchecked config tell."""
        ...

    def in_memory(self, spec: "TensorSpec | TensorInfo") -> bool:
        """Whether a model that the format's own library has loaded holds the tensor."""
        ...

    def in_module(self, spec: "TensorSpec | TensorInfo") -> bool:
        """Whether a module of qcli/nn holds the tensor. Others are checked as a checkpoint is read, and not loaded."""
        ...

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        """Module to what is stored of it. Every field that changes what bytes mean is checked. Raises CheckpointError."""
        ...

    def config_of(self, config: Mapping[str, Any], tensor: str) -> Mapping[str, Any]:
        """What a `quantization_config` would be of a model in which the weight `tensor` alone is quantized, for `read`."""
        ...

    def attribute(self, name: str) -> str:
        """The attribute of a module for a stored tensor's name relative to the module."""
        ...

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        """The modules that a `quantization_config` lists as not quantized; None where it lists none."""
        ...

    def renamings(self) -> list[tuple[str, str]]:
        """(pattern, replacement) that make `attribute` of the ends of full names, for transformers to read by."""
        ...


@cache
def get(name: str) -> Format:
    """The format of that name. Raises UsageError."""
    if name not in (*NAMES, *READ_ONLY):
        raise UsageError(f"there is no format {name!r}", f"Formats: {', '.join(NAMES)}.")
    found: Format = import_module(f"qcli.formats.{name.replace('-', '_')}").FORMAT
    return found


def all_formats() -> list[Format]:
    """Every format that is written, the widest-read first."""
    return [get(name) for name in NAMES]


def read_formats() -> list[Format]:
    """Every format."""
    return [get(name) for name in (*NAMES, *READ_ONLY)]


def holding(schemes: Sequence[Scheme], wanted: str | None = None, head: Scheme | None = None, tied: bool = False) -> Format:
    """The format `wanted`, or the first that holds all `schemes`, and `head` beside them: the scheme of an output head, which may
    be `tied` to the embedding. Raises UsageError with the reason where none does."""
    reasons, of_head = [], []
    for each in [get(wanted)] if wanted else all_formats():
        reason = next((reason for scheme in schemes if (reason := each.refuses(scheme))), None)
        if reason is None and not wanted:
            reason = each.refuses_mixture(schemes)
        if reason is not None:
            reasons.append(reason)
        elif head is None or (reason := each.refuses_head(head, schemes, tied)) is None:
            return each
        else:
            of_head.append(reason)
    if head is not None and of_head:
        raise UsageError(
            f"the head cannot be {head.name} beside the rest: {'; '.join(of_head)}", "Leave out --head, or the recipe's head."
        )
    hint = "qcli evaluate --methods measures what no format holds."
    if wanted and all(any(each.refuses(scheme) is None for each in all_formats()) for scheme in schemes):
        hint = "Leave out the format, or name a method that it holds: qcli methods lists them."
    raise UsageError("; ".join(dict.fromkeys(reasons)), hint)


def misfit(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why the format that is taken for `scheme` cannot hold a weight of that shape, as a sentence without its end; None where it
    can, or where no format holds the scheme at all."""
    taken = next((each for each in all_formats() if each.refuses(scheme) is None), None)
    return taken.refuses_shape(scheme, out_features, in_features) if taken else None


def written() -> list[str]:
    """The names of the schemes that `qcli quantize` can write: those that some format holds."""
    return [name for name in QUANTIZED if any(each.refuses(NAMED[name]) is None for each in all_formats())]


def of_config(config: Mapping[str, object]) -> Format | None:
    """The format that a `quantization_config` is of; None for one that qcli does not read."""
    return next((each for each in read_formats() if each.owns(config)), None)


def stored_bytes(scheme: Scheme, weight: Weight, outlier_columns: int = 0) -> int:
    """Bytes that `weight` takes on disk under `scheme`. `outlier_columns` stand beside it where the scheme keeps the original."""
    if scheme.keeps_original or not scheme.bits:
        return scheme.stored_bytes(weight.out_features, weight.in_features, weight.dtype, outlier_columns)
    stored, _ = stored_tensors(scheme, weight)
    return sum(spec.nbytes for spec in stored)


def quantized_weights(source: "Source") -> dict[str, Scheme]:
    """The tensors of codes in `source`, with their schemes, by its config and headers alone."""
    config, tensors, found = source.quantization, source.tensors, {}
    stated = of_config(config) if config else None
    for each in [stated] if stated else read_formats():
        for weight in dict.fromkeys(each.companions(tensors).values()):
            if scheme := each.scheme_of(weight, tensors, config):
                found[weight] = scheme
    return found


def held_bytes(scheme: Scheme, out_features: int, in_features: int) -> int | None:
    """Bytes of a weight in a module that looks its codes up in a table; None where modules hold what is stored."""
    parts = scheme.held_parts(out_features, in_features) if scheme.runs_by_table(in_features) else {}
    return sum(spec.nbytes for spec in parts.values()) or None


def _held(specs: list[TensorSpec], weight: Weight, scheme: Scheme) -> list[TensorSpec]:
    """Stored tensors as modules hold them: zero points one a byte."""
    if scheme.runs_by_table(weight.in_features):
        return list(scheme.held_parts(weight.out_features, weight.in_features).values())
    scales = scheme.scales(weight.out_features, weight.in_features)
    packed = ("zero_point", "qzeros") if scheme.scale == "model" else ()
    return [TensorSpec(spec.name, "I8", (scales,)) if spec.name.endswith(packed) else spec for spec in specs]


def unpack(stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
    """All parts of a weight, by role, from its stored tensors by attribute."""
    format = get(stored.format)
    return {"codes": format.codes(stored, tensors)} | format.scales(stored, tensors)


def stored_tensors(scheme: Scheme, weight: Weight) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """What is stored for `weight` under `scheme`, and what a loaded model holds of it. Without a format these are the parts."""
    for each in all_formats():
        if scheme.bits and each.refuses(scheme) is None:
            specs = each.tensors(weight, scheme)
            return specs, _held([spec for spec in specs if each.in_memory(spec)], weight, scheme)
    specs = list(scheme.parts(weight.out_features, weight.in_features, weight.dtype).values())
    return specs, specs
