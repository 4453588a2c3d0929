"""What a checkpoint holds, from headers and config alone."""

from dataclasses import dataclass, field

from qcli.checkpoint.dtypes import TORCH_NAMES
from qcli.checkpoint.source import Source

_4BIT_MARK = ".quant_state.bitsandbytes__"


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
    quantization_config: dict | None
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
    companions = _companions(source.tensors)
    for name, (_, info) in source.tensors.items():
        owner = companions.get(name, name)
        scheme = _scheme(source, owner)
        part = parts.setdefault((module_kind(owner), scheme), Part(module_kind(owner), scheme))
        part.bytes += info.nbytes
        if name == owner:
            part.tensors += 1
            part.parameters += 2 * info.nbytes if scheme in ("nf4", "fp4") else info.numel  # two codes a byte
    return Description(
        name=source.label,
        architecture=", ".join(source.architectures) or "not stated",
        model_type=source.config.get("model_type"),
        revision=source.revision,
        files=len(source.files),
        tensors=len(source.tensors),
        parameters=sum(p.parameters for p in parts.values()),
        bytes=sum(p.bytes for p in parts.values()),
        quantization_config=source.quantization,
        parts=sorted(parts.values(), key=lambda p: -p.bytes),
        problems=list(source.problems),
        notes=list(source.notes),
    )


def module_kind(tensor: str) -> str:
    """What the tables group by: q_proj, down_proj, embed_tokens, input_layernorm, ..."""
    parts = [p for p in tensor.split(".") if not p.isdigit()]
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def _companions(tensors) -> dict[str, str]:
    """Companion tensor -> the weight that it belongs to."""
    owners = {}
    for name in tensors:
        weight = name.partition(".weight.")[0] + ".weight"
        if ".weight." in name and weight in tensors:
            owners[name] = weight
        base, _, last = name.rpartition(".")
        if last in ("SCB", "weight_format") and f"{base}.weight" in tensors:
            owners[name] = f"{base}.weight"
    return owners


def _scheme(source: Source, weight: str) -> str:
    for quant_type in ("nf4", "fp4"):
        if f"{weight}{_4BIT_MARK}{quant_type}" in source.tensors:
            return quant_type
    if f"{weight.removesuffix('weight')}SCB" in source.tensors:
        return "llm-int8"
    code = source.tensors[weight][1].dtype
    return TORCH_NAMES.get(code, code)
