"""What a weight is stored as, as data, and the one table of names that every verb reads. No torch here.

`quantize` makes a scheme, formats lay it out, `estimate-memory` counts it, `evaluate` and `inspect-outliers` simulate it, `info`
and `generate` read it back. So a name means the same thing in each of them: `nf4` is NF4 with double quantization everywhere.
Bytes and working memory follow from a scheme and are stated nowhere else.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from qcli.checkpoint.dtypes import TensorSpec
from qcli.errors import UsageError
from qcli.packing import plane_bytes

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # of blocks of the flattened weight that kernels decode
NESTED_BLOCK_SIZE = 256  # absmax values that share a scale under double quantization (bitsandbytes)
WHOLE_ROW = -1  # the group size that stands for a row
FP8_BLOCK = 128  # rows and columns of a block of FP8 (DeepSeek-V3)
MOST_SPARSE = 0.5  # of a row that may be kept beside the codes
# How a scale is found: from the absmax alone, by the least squared error, or with each column's error weighted by E[x^2] of texts.
SEARCHES = ("none", "mse", "imatrix")
ROUNDINGS = ("nearest", "gptq")  # how codes are chosen under their scales
TOKEN_WEIGHTS = ("none", "fisher")  # by what tokens count in what is summed over them: alike, or by squared gradients
TRANSFORMS = ("none", "awq")  # what inputs are divided by before their modules are rounded
PAPER_THRESHOLD = 6.0  # LLM.int8() (arXiv:2208.07339, section 3.2)
OUTLIER_SHARE = 0.05  # of the columns of a weight, those that a calibrated LLM.int8() stores in 16 bits, at most
COLUMNS_TOGETHER = 8  # columns are stored in multiples of it, so that a row of 16-bit values is aligned to 16 bytes
_NEARLY = 1e-6  # of a column: c / n * n may come out below c

CHUNK_BYTES = 1 << 20  # of source data at a time: what bounds the memory of quantizing a checkpoint
CHUNKS_IN_WORK = 128  # measured: float32 copies of a chunk, and what the allocator keeps of those that were freed

Share = Literal["flat", "group", "row", "block", "tensor"]


@dataclass(frozen=True)
class Scheme:
    """A weight w [out_features, in_features] stands as codebook[code] * scale, or as (code - zero_point) * scale.

    name: what users type. method: the file in methods/ that makes it.
    bits: of a code; 0 where nothing is quantized.
    share: which elements have one scale. "flat": runs of `size` elements of the flattened weight. "group": runs of `size`
    elements within a row. "row": an output row. "block": squares of `size` rows and columns. "tensor": all.
    codebook: whose entry a code names: "nf4", "fp4" (QLoRA) or "nf3", the small floats "e4m3" and "e2m1" (OCP), or the "table"
    of each output row, of 2^bits entries without a scale; None where a code is itself an integer.
    zero_point: whether an integer zero point stands beside each scale, and beside the activations' scales.
    scale: the dtype of a scale: "float32", "model" (that of the weight), "e8m0" (a power of two), or "e4m3" over a float32 scale of
    the whole weight. Of a table's entries: "float16" or "float32".
    double_quant: whether the scales are 8-bit codes themselves, with a float32 scale for every 256.
    activations: what shares a scale of the activations: "token", "tensor" or "group"; "static" where the one scale is stored; None
    where activations are not rounded.
    activation_codebook: what they are rounded to: "e4m3" or "e2m1"; None for int8.
    threshold: columns with an activation of this magnitude or more are not rounded; 0 rounds all.
    sparse: the share of each row that is kept beside the codes as it is.
    keeps_original: whether those columns multiply with the unquantized weight, kept beside the codes (the paper's form).
    outlier_share: the largest share of the columns that are chosen once, by texts, are never rounded, and multiply with columns of
    the unquantized weight that are stored in 16 bits.
    """

    name: str
    method: str
    bits: int
    share: Share = "tensor"
    size: int = 0
    codebook: str | None = None
    zero_point: bool = False
    scale: Literal["float32", "float16", "model", "e8m0", "e4m3"] = "float32"
    double_quant: bool = False
    activations: Literal["token", "tensor", "group", "static"] | None = None
    activation_codebook: str | None = None
    threshold: float = 0.0
    sparse: float = 0.0
    keeps_original: bool = False
    outlier_share: float = 0.0

    def outlier_columns(self, in_features: int) -> int:
        """How many columns of a weight with so many are stored in 16 bits: a multiple of 8, or 0."""
        count = int(self.outlier_share * in_features + _NEARLY)
        return count // COLUMNS_TOGETHER * COLUMNS_TOGETHER

    def scales(self, out_features: int, in_features: int) -> int:
        """How many scales a weight of this shape has."""
        count = out_features * in_features
        if self.share == "flat":
            return -(-count // self.size)
        return prod(self.scale_shape(out_features, in_features))

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Rows and columns of the scales of a weight of this shape, unless its blocks are flat."""
        if self.share == "group":
            return out_features, -(-in_features // self.size)
        if self.share == "block":
            return -(-out_features // self.size), -(-in_features // self.size)
        return (out_features if self.share == "row" else 1), 1

    def parts(self, out_features: int, in_features: int, dtype: str = "BF16") -> dict[str, TensorSpec]:
        """What represents a weight before any format lays it out: role to tensor. `dtype` is the safetensors code of the
        unquantized weight, which is the one part where nothing is quantized."""
        if not self.bits:
            return {"weight": TensorSpec("weight", dtype, (out_features, in_features))}
        count, scales = out_features * in_features, self.scales(out_features, in_features)
        packed = TensorSpec("codes", "U8", (-(-count * self.bits // 8),))
        found = {"codes": TensorSpec("codes", "I8", (out_features, in_features)) if self.bits == 8 else packed}
        if self.codebook == "table":
            found["table"] = TensorSpec("table", "F16" if self.scale == "float16" else "F32", (out_features, 1 << self.bits))
            if kept := self.sparse_columns(in_features):
                found["sparse_values"] = TensorSpec("sparse_values", dtype, (out_features, kept))
                found["sparse_columns"] = TensorSpec("sparse_columns", "I32", (out_features, kept))
            return found
        of_scale = "U8" if self.double_quant else {"model": dtype, "e8m0": "U8", "e4m3": "F8_E4M3"}.get(self.scale, "F32")
        found["scale"] = TensorSpec("scale", of_scale, (scales,))
        if self.scale == "e4m3":
            found["global_scale"] = TensorSpec("global_scale", "F32", (1,))
        if self.double_quant:
            found["nested_scale"] = TensorSpec("nested_scale", "F32", (-(-scales // NESTED_BLOCK_SIZE),))
            found["nested_offset"] = TensorSpec("nested_offset", "F32", (1,))
        if self.zero_point:
            found["zero_point"] = TensorSpec("zero_point", "I8" if self.scale == "model" else "I32", (scales,))
        if columns := self.outlier_columns(in_features):
            found["outlier_columns"] = TensorSpec("outlier_columns", "I32", (columns,))
            found["outlier_weight"] = TensorSpec("outlier_weight", dtype if dtype == "F16" else "BF16", (out_features, columns))
        return found

    def runs_by_table(self, in_features: int) -> bool:
        """Whether products look codes up in a table: all of 2 and 3 bits, and 4 bits in groups that do not divide rows."""
        ragged = self.share == "group" and in_features % self.size != 0
        return self.bits in (2, 3) or (self.bits == 4 and ragged) or self.codebook == "table"

    def sparse_columns(self, in_features: int) -> int:
        """How many elements of a row are kept beside the codes."""
        return max(1, round(self.sparse * in_features)) if self.sparse else 0

    def held_parts(self, out_features: int, in_features: int) -> dict[str, TensorSpec]:
        """What a module that looks codes up holds, role to tensor: codes in planes, and the rest in float32."""
        scales = self.scale_shape(out_features, in_features)
        found = {"codes": TensorSpec("codes", "U8", (out_features, plane_bytes(in_features, self.bits)))}
        if self.codebook == "table":
            found["table"] = TensorSpec("table", "F32", (out_features, 1 << self.bits))
            if count := out_features * self.sparse_columns(in_features):
                found["sparse_values"] = TensorSpec("sparse_values", "F32", (count,))
                found["sparse_columns"] = TensorSpec("sparse_columns", "I32", (count,))
                found["sparse_offsets"] = TensorSpec("sparse_offsets", "I32", (out_features + 1,))
            return found
        found["table"] = TensorSpec("table", "F32", (1 << self.bits,))
        found["scale"] = TensorSpec("scale", "F32", (out_features, scales[1]))
        if self.zero_point:
            found["zero_point"] = TensorSpec("zero_point", "F32", (out_features, scales[1]))
        return found

    def stored_bytes(self, out_features: int, in_features: int, dtype: str = "BF16", outlier_columns: int = 0) -> int:
        """Bytes of the parts. `outlier_columns` stand beside the codes in `dtype` where the scheme keeps the original."""
        beside = TensorSpec("original", dtype, (out_features, outlier_columns if self.keeps_original else 0))
        return beside.nbytes + sum(spec.nbytes for spec in self.parts(out_features, in_features, dtype).values())

    def held_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes that an encoder of this scheme holds from the first chunk of a weight to the last.

        A scale takes 8: the float32 itself, and two sums in 16 bits that say what its own rounding will cost, or its copy. Under
        double quantization the float64 copies of which the mean is made come on top.
        """
        tables = self.parts(out_features, in_features, "F32") if self.codebook == "table" else {}
        beside = sum(spec.nbytes for role, spec in tables.items() if role != "codes")
        beside += 2 * out_features * self.outlier_columns(in_features)
        return (24 if self.share == "flat" else 8) * self.scales(out_features, in_features) + beside


UNQUANTIZED = Scheme("unquantized", "unquantized", 0)
_PER_TENSOR = Scheme("int8-per-tensor", "int8", 8, "tensor", activations="tensor")
_INT8 = Scheme("int8", "int8", 8, "row", scale="model", activations="token")
_LLM_INT8 = Scheme("llm-int8", "llm-int8", 8, "row", activations="token", threshold=PAPER_THRESHOLD)
_NF4 = Scheme("nf4", "nf4", 4, "flat", 64, codebook="nf4", double_quant=True)
_FP4 = replace(_NF4, name="fp4", method="fp4", codebook="fp4")

# The one list of names, in the order in which tables show them. A method that is added is a row here.
NAMED: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        UNQUANTIZED,
        # Table 1 of LLM.int8(): absmax with a scale for all of X and all of W; for each token and all of W; for each token and row.
        _PER_TENSOR,
        replace(_PER_TENSOR, name="int8-row-wise", activations="token"),
        _INT8,
        replace(_PER_TENSOR, name="zeropoint-per-tensor", method="zeropoint", zero_point=True),
        replace(_INT8, name="zeropoint", method="zeropoint", zero_point=True, scale="float32"),
        replace(_LLM_INT8, name="llm-int8-paper", keeps_original=True),
        _LLM_INT8,
        replace(_NF4, name="nf4-plain", double_quant=False),
        _NF4,
        replace(_FP4, name="fp4-plain", double_quant=False),
        _FP4,
        Scheme("nf3", "nf3", 3, "group", 64, codebook="nf3", scale="model"),
        Scheme("kmeans", "kmeans", 4, "row", codebook="table", scale="float16"),
        Scheme("squeezellm", "squeezellm", 4, "row", codebook="table", scale="float16", sparse=0.005),
        Scheme("rtn", "rtn", 4, "group", 128, scale="model"),
        Scheme("hqq", "hqq", 4, "group", 64, zero_point=True, scale="model"),
        Scheme("fp8", "fp8", 8, "row", codebook="e4m3", scale="model", activations="token", activation_codebook="e4m3"),
        Scheme("mxfp4", "mxfp4", 4, "group", 32, codebook="e2m1", scale="e8m0"),
        Scheme("nvfp4", "nvfp4", 4, "group", 16, codebook="e2m1", scale="e4m3"),
        replace(_INT8, name="smoothquant", method="smoothquant"),
        Scheme("awq", "awq", 4, "group", 128, zero_point=True, scale="model"),
    )
}
# Methods that change what is quantized by what texts say, and the ones that store the same without texts.
BY_TEXTS: Mapping[str, str] = {"squeezellm": "kmeans", "smoothquant": "int8", "awq": "rtn"}
QUANTIZED = tuple(name for name, scheme in NAMED.items() if scheme.bits)
BY_BITS: Mapping[int, str] = {4: "nf4", 8: "llm-int8"}
_INTEGER_BITS = (3, 2)  # for which integers in groups are the one method


def named(name: str) -> Scheme:
    """The scheme of that name, whatever its case and punctuation. Raises UsageError."""
    known = {_plain(each): scheme for each, scheme in NAMED.items()}
    wanted = _plain(name)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(known[each].name for each in near)}" if near else ""
    raise UsageError(f"there is no method {name!r}{nearest}", f"Methods: {', '.join(NAMED)}.")


def chosen(names: str | Iterable[str]) -> list[Scheme]:
    """The schemes of a list, or of names with commas between them, in the table's order; "all" is all that need no texts. The
    unquantized one is always among them. Raises UsageError, also for a method that only texts make."""
    names = names.split(",") if isinstance(names, str) else list(names)
    every = any(_plain(name) == "all" for name in names)
    wanted = {named(name).name for name in names if _plain(name) != "all"} | {UNQUANTIZED.name}
    if by_texts := next((name for name in BY_TEXTS if name in wanted), None):
        raise UsageError(
            f"{by_texts} is {BY_TEXTS[by_texts]} after a change that texts decide, which is not made here",
            f"Make a checkpoint with qcli quantize --method {by_texts}, and give that as the model.",
        )
    return [scheme for name, scheme in NAMED.items() if name in wanted or (every and name not in BY_TEXTS)]


def by_bits(bits: int | None, method: str | None) -> Scheme:
    """What `--bits` and `--method` ask for together: NF4 where neither was given. Raises UsageError where they disagree."""
    if bits is not None and bits not in (*BY_BITS, *_INTEGER_BITS) and method is None:
        raise UsageError(
            f"bits is {bits}, expected 4, 8, 3 or 2", "Use --bits 4 for NF4, --bits 8 for LLM.int8(), 3 or 2 for integers (rtn)."
        )
    if method is None:
        return NAMED["rtn" if bits in _INTEGER_BITS else BY_BITS[bits or 4]]
    return named(method)


def head_bits(asked: int | None) -> int | None:
    """What `--head` asks for: the bits of a quantized output head, None where it stays in 16. Raises UsageError."""
    if asked not in (None, 16, *BY_BITS):
        raise UsageError(f"head is {asked}, expected 16, 8 or 4", "Set it to the bits of the output head.")
    return None if asked == 16 else asked


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
