"""Modules that hold a quantized weight in its stored layout. One kind is one file here, and the folder is the registry."""

from functools import cache
from importlib import import_module
from pathlib import Path

import torch

from qcli.formats import Stored
from qcli.nn.quantized_linear import QuantizedLinear


def module_for(
    stored: Stored, tensors: dict[str, torch.Tensor], *, bias: bool, dtype: torch.dtype, compute_dtype: torch.dtype
) -> QuantizedLinear:
    """The module that runs `stored`: of the first kind that serves it. `tensors` are those of `stored` by attribute; meta tensors
    will do until they are loaded. `dtype` is that of the bias. `compute_dtype` is what products of float32 inputs are made in."""
    kind = next(kind for kind in _kinds() if kind.serves(stored))
    module = kind.of(stored, tensors, bias=bias, dtype=dtype, compute_dtype=compute_dtype)
    module.scheme = stored.scheme
    return module


@cache
def _kinds() -> tuple[type[QuantizedLinear], ...]:
    names = sorted(path.stem for path in Path(__file__).parent.glob("linear_*.py"))
    return tuple(import_module(f"qcli.nn.{name}").MODULE for name in names)
