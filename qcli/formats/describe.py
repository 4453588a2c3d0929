"""What a checkpoint holds, from headers and config alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from qcli import formats
from qcli.checkpoint.dtypes import TORCH_NAMES
from qcli.checkpoint.names import module_kind
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import Source
from qcli.files.foreign_json import finite
from qcli.formats import Format
from qcli.schemes import Scheme


@dataclass
class Part:
    """The tensors of one module kind in one scheme. Companions (absmax, SCB, ...) count as bytes, not as parameters."""

    kind: str
    scheme: str
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0


@dataclass
class Description:
    """See the module. `architecture` and `scheme` are words for people; the rest are counts and bytes."""

    name: str
    architecture: str
    model_type: str | None
    revision: str | None
    files: int
    tensors: int
    parameters: int
    bytes: int
    quantization_config: dict[str, object] | None
    parts: list[Part]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Everything stored, over the parameters."""
        return 8 * self.bytes / max(self.parameters, 1)


def describe(source: Source) -> Description:
    """The description of an opened source."""
    parts: dict[tuple[str, str], Part] = {}
    companions = {name: weight for each in formats.read_formats() for name, weight in each.companions(source.tensors).items()}
    for name, info in source.tensors.items():
        owner = companions.get(name, name)
        format, scheme = _scheme(owner, source.tensors, source.quantization)
        word = scheme.name if scheme else TORCH_NAMES.get(source.tensors[owner].dtype, source.tensors[owner].dtype)
        kind = module_kind(format.weight_name(owner) if format else owner)
        part = parts.setdefault((kind, word), Part(kind, word))
        part.bytes += info.nbytes
        if name == owner:
            part.tensors += 1
            part.parameters += format.parameters_in(info, scheme, source.quantization) if format and scheme else info.numel
    return Description(
        name=source.label,
        architecture=", ".join(source.architectures) or "not stated",
        model_type=source.config.get("model_type"),
        revision=source.revision,
        files=len(source.files),
        tensors=len(source.tensors),
        parameters=sum(p.parameters for p in parts.values()),
        bytes=sum(p.bytes for p in parts.values()),
        quantization_config=None if source.quantization is None else {k: finite(v) for k, v in source.quantization.items()},
        parts=sorted(parts.values(), key=lambda p: -p.bytes),
        problems=list(source.problems),
        notes=list(source.notes),
    )


def _scheme(codes: str, infos: Mapping[str, TensorInfo], config: dict[str, object] | None) -> tuple[Format | None, Scheme | None]:
    for each in formats.read_formats():
        if scheme := each.scheme_of(codes, infos, config):
            return each, scheme
    return None, None
