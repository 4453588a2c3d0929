"""Columns of a weight that a calibrated LLM.int8() stores in 16 bits beside its codes, for bitsandbytes' format and qcli's own.

  outlier_columns  I32 [n]                         ascending numbers of columns
  outlier_weight   BF16 or F16 [out_features, n]   those columns of the weight

They lie in a file of their own. The index of the other files names it in its metadata alone: transformers reads the files that
weight_map names, and vLLM passes over those that it does not.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import TYPE_CHECKING

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.weight_files import OUTLIERS
from qcli.formats import Weight
from qcli.schemes import Scheme

if TYPE_CHECKING:
    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

FILE = OUTLIERS
ROLES = ("outlier_columns", "outlier_weight")


def tensors(weight: Weight, scheme: Scheme) -> Iterable[TensorSpec]:
    """What is stored beside the codes of `weight`."""
    parts = scheme.parts(weight.out_features, weight.in_features, weight.dtype)
    base = weight.name.removesuffix("weight")
    return [TensorSpec(f"{base}{role}", parts[role].dtype, parts[role].shape) for role in ROLES if role in parts]


def share(base: str, tensors: "Mapping[str, TensorInfo]") -> float:
    """The share of the columns of the module `base` that have a place; 0 without any."""
    columns, codes = tensors.get(f"{base}outlier_columns"), tensors[f"{base}weight"]
    rows = prod(tensors[f"{base}SCB"].shape)
    return prod(columns.shape) * rows / prod(codes.shape) if columns and prod(codes.shape) else 0.0


def read(source: "Source", linear: Linear) -> dict[str, str]:
    """Attribute to tensor of what is stored beside the codes of a module, checked. Raises Problem."""
    import numpy as np

    from qcli.formats._reading import Problem, expect, read_bytes

    base = linear.tensor.removesuffix("weight")
    names = {role: f"{base}{role}" for role in ROLES}
    lacking = [name for name in names.values() if name not in source.tensors]
    if len(lacking) == len(names):
        return {}
    if lacking:
        raise Problem(f"{linear.module} lacks {lacking[0]}")
    columns, count = names["outlier_columns"], prod(source.tensors[names["outlier_columns"]].shape)
    if not 0 < count <= linear.in_features:
        raise Problem(f"{columns} names {count:,} columns, expected 1 to {linear.in_features:,}")
    expect(source, columns, ("I32",), (count,))
    expect(source, names["outlier_weight"], ("BF16", "F16"), (linear.out_features, count))
    stored = np.frombuffer(read_bytes(source, columns), dtype="<i4")
    outside = stored[(stored < 0) | (stored >= linear.in_features)]
    if len(outside):
        raise Problem(f"{columns} names column {outside[0]}, expected 0 to {linear.in_features - 1:,}")
    if (stored[1:] <= stored[:-1]).any():
        raise Problem(f"{columns} is not ascending")
    return names
