"""Bytes of a model's weights under each method: in memory, in a checkpoint, and as CUDA allocates them.

A quantized linear weight takes what its format (qcli/formats/) stores of its scheme (qcli/schemes.py). Where no format holds the
scheme, it takes the scheme's own parts. Everything else keeps the model's dtype.
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
from qcli.schemes import BY_BITS, NAMED, NESTED_BLOCK_SIZE, QUANTIZED
from qcli.sizes import format_bytes

ITEMSIZE = {name: dtypes.ITEMSIZE[dtypes.CODES[name]] for name in dtypes.MODEL_DTYPES}
METHODS = (*ITEMSIZE, *QUANTIZED, "stored")
_TABLE_ITEMSIZE = dtypes.ITEMSIZE["F32"]  # of codebooks: 16 entries for codes, 256 for absmax under double quantization
_CUDA_GRANULE = 512  # bytes; torch's CUDA allocator rounds up to a multiple of it
# Names of single experts, of which transformers makes one tensor.
_EXPERT = re.compile(r"experts\.\d+\.")
_FUSED = re.compile(r"(experts\.)(?:gate_proj|up_proj|gate_up_proj|w1|w3)(?=\.|$)")


@dataclass(frozen=True)
class Weights:
    """Bytes of all weights under one method.

    by_kind: bytes in memory by Parameter.kind. total: their sum. stored: bytes of the tensors in a checkpoint of this method.
    allocated: `total` with each tensor rounded up to CUDA's 512 B. bits_per_weight: `total` in bits over all parameters. largest:
    bytes of the largest tensor that is whole in the model's dtype, together with its final form, while the model loads. That is a
    weight before it is quantized, or experts before they are fused; 0 where there is neither. formula: a sentence for each term.
    """

    by_kind: dict[str, int]
    total: int
    stored: int
    allocated: int
    bits_per_weight: float
    largest: int
    formula: list[str] = field(default_factory=list)


def weights(parameters: Sequence[Parameter], method: str, dtype: str = "bfloat16", *, every_linear: bool = False) -> Weights:
    """The bytes of `parameters` under `method`, one of METHODS. Unquantized ones are in `dtype`, a key of ITEMSIZE.

    If the method is a dtype, the whole model is in that dtype. "stored" is a checkpoint as it is, with its plain tensors loaded in
    `dtype`. `every_linear` also quantizes what transformers leaves alone, T5's `wo` and Falcon's layers, as the paper's own code
    did. Raises UsageError.
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
        by_kind=dict(by_kind),
        total=total,
        stored=stored,
        allocated=allocated,
        bits_per_weight=8 * total / max(count, 1),
        largest=largest,
        formula=[counted.sentence(name, dtype) for name, counted in terms.items()],
    )


def _tensors(parameter: Parameter, method: str, dtype: str, every_linear: bool) -> tuple[str, list[int], int]:
    """The name of the term that counts `parameter`, the bytes of each of its tensors in memory, and its bytes in a checkpoint."""
    if method == "stored" and parameter.scheme is not None:
        return "stored", [parameter.stored], parameter.stored
    quantized = method_of(parameter, method, every_linear)
    if quantized is None:
        keeps = parameter.keep_fp32 and dtype == "float16" and not (every_linear and method in QUANTIZED)
        kept = "float32" if keeps else dtype
        size = parameter.numel * ITEMSIZE[kept]
        return kept, [size], size
    tensors, size = _quantized(quantized, (parameter.out_features, parameter.in_features), dtype)
    return quantized, tensors, size


def method_of(parameter: Parameter, method: str, every_linear: bool = False) -> str | None:
    """What quantizes `parameter` in a model that `method` quantizes; None where it stays as it is. See `weights`."""
    if method not in QUANTIZED or not parameter.numel:
        return None
    if parameter.head_bits is not None:
        return method if NAMED[method].bits == parameter.head_bits else BY_BITS[parameter.head_bits]
    return method if parameter.quantizable or (every_linear and parameter.linear) else None


@functools.cache
def _quantized(method: str, shape: tuple[int, int], dtype: str) -> tuple[list[int], int]:
    """Bytes in memory of each tensor of a quantized weight of `shape`, and its bytes in a checkpoint."""
    scheme = NAMED[method]
    stored, resident = stored_tensors(scheme, Weight("weight", *shape, dtypes.CODES[dtype]))
    parts = scheme.parts(*shape)
    # In memory it is a tensor of its own. On disk it stands inside the quant_state.
    inside = [parts["nested_offset"].nbytes] if scheme.double_quant else []
    return [spec.nbytes for spec in resident] + inside, sum(spec.nbytes for spec in stored)


def _rule(name: str, dtype: str) -> str:
    """What a weight takes under a method, in words. `dtype` is that of the unquantized weights."""
    if name == "stored":
        return "as the checkpoint holds them"
    if name in ITEMSIZE:
        return f"{ITEMSIZE[name]} bytes each"
    scheme = NAMED[name]
    by_table = scheme.runs_by_table(scheme.size)
    parts = scheme.held_parts(1, scheme.size) if by_table else scheme.parts(1, scheme.size or 1, dtypes.CODES[dtype])
    each = {3: "3 bits", 4: "half a byte", 8: "1 byte"}[scheme.bits]
    shared = {"flat": f"a block of {scheme.size}", "group": f"a group of {scheme.size}", "row": "a row", "tensor": "a tensor"}
    if scheme.codebook == "table":
        return f"{each} each and {_bytes(parts['table'].nbytes)} a row"
    scale = _bytes(dtypes.ITEMSIZE[parts["scale"].dtype]) + (" and a zero point" if scheme.zero_point else "")
    terms = [f"{each} each", f"{scale} {shared[scheme.share]}"]
    tables = 0
    if scheme.double_quant:
        terms.append(f"{_bytes(parts['nested_scale'].nbytes)} every {NESTED_BLOCK_SIZE} blocks")
        tables = parts["nested_offset"].nbytes + _TABLE_ITEMSIZE * 256
    if scheme.codebook:
        terms.append(f"{tables + _TABLE_ITEMSIZE * 2**scheme.bits:,} bytes a tensor")
    return f"{', '.join(terms[:-1])} and {terms[-1]}"


def _bytes(count: int) -> str:
    return f"{count} byte{'s' if count > 1 else ''}"


@dataclass
class _Term:
    """What one rule has counted: bytes, elements, and kinds of parameters."""

    size: int = 0
    count: int = 0
    kinds: dict[str, None] = field(default_factory=dict)

    def add(self, parameter: Parameter, size: int) -> None:
        self.size += size
        self.count += parameter.numel
        self.kinds[parameter.kind] = None

    def sentence(self, name: str, dtype: str) -> str:
        return f"{', '.join(self.kinds)}: {self.count:,} parameters in {name}, {_rule(name, dtype)}: {format_bytes(self.size)}"
