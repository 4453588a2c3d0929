"""Bytes of a model's weights under each method: as they lie in memory, as they are stored, and as CUDA allocates them.

Formulas, for a linear weight of n elements in blocks of 64 (QLoRA, arXiv:2305.14314, section 3):
  4 bit plain    ceil(n/2) codes, 4 ceil(n/64) absmax, 64 codebook
  double quant   ceil(n/2) codes, ceil(n/64) absmax, 4 ceil(ceil(n/64)/256) their own absmax, 64 + 1024 codebooks, 4 offset
  LLM.int8()     n codes, 4 a row for the row's absmax (arXiv:2208.07339)
Everything else keeps the model's dtype.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qcli.checkpoint.dtypes import CODES
from qcli.errors import UsageError
from qcli.formats.bitsandbytes import outputs_4bit, outputs_8bit
from qcli.memory.model.tensor_rules import ONLY_STORED, Parameter
from qcli.sizes import format_bytes

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
METHODS = (*ITEMSIZE, "llm-int8", "nf4", "nf4-plain", "fp4", "stored")
# method -> codebook, double quantization
_QUANT_TYPES = {"nf4": ("nf4", True), "nf4-plain": ("nf4", False), "fp4": ("fp4", True)}
_BLOCK_SIZE = 64
_OFFSET = 4  # float32, by which double quantization shifts absmax; stored inside of the quant_state
_CUDA_GRANULE = 512  # bytes, to which torch's CUDA allocator rounds
# Names of the experts that transformers makes one tensor of.
_EXPERT = re.compile(r"experts\.\d+\.")
_FUSED = re.compile(r"(experts\.)(?:gate_proj|up_proj|gate_up_proj|w1|w3)(?=\.|$)")
_DOUBLE = "half a byte each, 1 byte a block of 64, 4 bytes every 256 blocks and 1,092 bytes a tensor"
_RULES = {
    "llm-int8": "1 byte each and 4 bytes a row",
    "nf4": _DOUBLE,
    "fp4": _DOUBLE,
    "nf4-plain": "half a byte each, 4 bytes a block of 64 and 64 bytes a tensor",
    "stored": "as the checkpoint holds them",
}


@dataclass(frozen=True)
class Weights:
    """by_kind: resident bytes by Parameter.kind; total: their sum.

    stored: bytes of the tensors in a checkpoint of this method. allocated: `total` with each tensor rounded up to CUDA's 512 B.
    bits_per_weight: of `total` over all parameters. largest: bytes of the largest tensor that has to be whole in the model's
    dtype, beside its final form, while the model loads: a weight before it is quantized, or experts before they are fused;
    0 where none has. formula: a sentence for each term.
    """

    by_kind: dict[str, int]
    total: int
    stored: int
    allocated: int
    bits_per_weight: float
    largest: int
    formula: list[str] = field(default_factory=list)


def weights(parameters: Sequence[Parameter], method: str, dtype: str = "bfloat16", *, every_linear: bool = False) -> Weights:
    """The bytes of `parameters` under `method`, one of METHODS, the unquantized ones in `dtype`, a key of ITEMSIZE.

    A dtype as method is the whole model's dtype. "stored" is a checkpoint as it is, its plain tensors loaded in `dtype`.
    `every_linear` quantizes what transformers leaves alone: T5's `wo` and Falcon's layers, as the paper's own code did.
    Raises UsageError.
    """
    if method not in METHODS:
        raise UsageError(f"the method is {method!r}, expected one of {', '.join(METHODS)}")
    if dtype not in ITEMSIZE:
        raise UsageError(f"the dtype is {dtype!r}, expected one of {', '.join(ITEMSIZE)}")
    dtype = method if method in ITEMSIZE else dtype
    by_kind: Counter[str] = Counter()
    terms: dict[str, _Term] = {}
    fused: Counter[str] = Counter()
    stored = allocated = largest = 0
    for parameter in parameters:
        term, tensors, on_disk = _tensors(parameter, method, dtype, every_linear)
        held = sum(tensors)
        by_kind[parameter.kind] += held
        stored += on_disk
        allocated += sum(-(-size // _CUDA_GRANULE) * _CUDA_GRANULE for size in tensors)
        if term not in (*ITEMSIZE, "stored"):
            largest = max(largest, parameter.numel * ITEMSIZE[dtype])
        elif parameter.kind == "experts" and term != "stored":
            fused[_FUSED.sub(r"\1gate_up", _EXPERT.sub("experts.", parameter.name))] += held
        terms.setdefault(term, _Term()).add(parameter, held)
    total = sum(by_kind.values())
    largest = max([largest, *fused.values()])
    count = sum(parameter.numel for parameter in parameters)
    return Weights(
        dict(by_kind), total, stored, allocated, 8 * total / max(count, 1), largest, [t.sentence(name) for name, t in terms.items()]
    )


def _tensors(parameter: Parameter, method: str, dtype: str, every_linear: bool) -> tuple[str, list[int], int]:
    """The term that counts `parameter`, bytes of each of its tensors in memory, and bytes in a checkpoint."""
    if method == "stored" and parameter.scheme is not None:
        return "stored", [parameter.stored], parameter.stored
    quantizes = method == "llm-int8" or method in _QUANT_TYPES
    if not (quantizes and parameter.numel and (parameter.quantizable or (every_linear and parameter.linear))):
        keeps = parameter.keep_fp32 and dtype == "float16" and not (every_linear and quantizes)
        kept = "float32" if keeps else dtype
        size = parameter.numel * ITEMSIZE[kept]
        return kept, [size], size
    tensors, size = _quantized(method, (parameter.out_features, parameter.numel // parameter.out_features), dtype)
    return method, tensors, size


@functools.cache
def _quantized(method: str, shape: tuple[int, int], dtype: str) -> tuple[list[int], int]:
    """Bytes in memory of each tensor of a quantized weight of `shape`, and its bytes in a checkpoint."""
    if method == "llm-int8":
        specs, extra = outputs_8bit("weight", shape), []
    else:
        quant_type, double = _QUANT_TYPES[method]
        specs = outputs_4bit("weight", shape, quant_type, _BLOCK_SIZE, double, CODES[dtype])
        extra = [_OFFSET] if double else []
    sizes = {spec.name: spec.nbytes for spec in specs}
    resident = [size for name, size in sizes.items() if not ONLY_STORED.search(name)]
    return resident + extra, sum(sizes.values())


@dataclass
class _Term:
    """What one rule counts: bytes, elements, and the kinds that it counted."""

    size: int = 0
    count: int = 0
    kinds: dict[str, None] = field(default_factory=dict)

    def add(self, parameter: Parameter, size: int) -> None:
        self.size += size
        self.count += parameter.numel
        self.kinds[parameter.kind] = None

    def sentence(self, name: str) -> str:
        rule = _RULES.get(name) or f"{ITEMSIZE[name]} bytes each"
        return f"{', '.join(self.kinds)}: {self.count:,} parameters in {name}, {rule}: {format_bytes(self.size)}"
