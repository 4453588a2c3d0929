"""Bytes of a model's weights under each method: as they lie in memory, as they are stored, and as CUDA allocates them.

A quantized linear weight takes what its format (qcli/formats/) stores of its scheme (qcli/schemes.py), or the scheme's own parts
where no format holds it. Everything else keeps the model's dtype.
"""

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from qcli.checkpoint import dtypes
from qcli.errors import UsageError
from qcli.formats import Weight, stored_tensors
from qcli.memory.model.tensor_rules import Parameter
from qcli.schemes import NAMED, NESTED_BLOCK_SIZE, QUANTIZED
from qcli.sizes import format_bytes

ITEMSIZE = {name: dtypes.ITEMSIZE[dtypes.CODES[name]] for name in dtypes.MODEL_DTYPES}
METHODS = (*ITEMSIZE, *QUANTIZED, "stored")
_OFFSET = 4  # float32, by which double quantization shifts absmax; stored inside of the quant_state
_CUDA_GRANULE = 512  # bytes, to which torch's CUDA allocator rounds
# Names of the experts that transformers makes one tensor of.
_EXPERT = re.compile(r"experts\.\d+\.")
_FUSED = re.compile(r"(experts\.)(?:gate_proj|up_proj|gate_up_proj|w1|w3)(?=\.|$)")


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
    quantizes = method in QUANTIZED
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
    scheme = NAMED[method]
    stored, resident = stored_tensors(scheme, Weight("weight", *shape, dtypes.CODES[dtype]))
    extra = [_OFFSET] if scheme.double_quant else []
    return [spec.nbytes for spec in resident] + extra, sum(spec.nbytes for spec in stored)


def _rule(name: str) -> str:
    """What a weight takes under a method, in words."""
    if name == "stored":
        return "as the checkpoint holds them"
    if name in ITEMSIZE:
        return f"{ITEMSIZE[name]} bytes each"
    scheme = NAMED[name]
    each = "half a byte" if scheme.bits == 4 else f"{scheme.bits / 8:g} byte{'s' if scheme.bits > 8 else ''}"
    shared = {"flat": f"a block of {scheme.size}", "group": f"a group of {scheme.size}", "row": "a row", "tensor": "a tensor"}
    scale = "1 byte" if scheme.double_quant else "4 bytes"
    if scheme.zero_point:
        scale += " and a zero point"
    nested = f" and 4 bytes every {NESTED_BLOCK_SIZE} blocks" if scheme.double_quant else ""
    tables = 4 * (2**scheme.bits + 256 * scheme.double_quant + scheme.double_quant) if scheme.codebook else 0
    table = f" and {tables:,} bytes a tensor" if tables else ""
    if nested:
        return f"{each} each, {scale} {shared[scheme.share]},{nested.removeprefix(' and')}{table}"
    return f"{each} each{',' if table else ' and'} {scale} {shared[scheme.share]}{table}"


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
        return f"{', '.join(self.kinds)}: {self.count:,} parameters in {name}, {_rule(name)}: {format_bytes(self.size)}"
