"""What the ops of a decoding step share: checks of activations, and the cache of keys and values (kernels/cpu/cache.h)."""

from typing import NamedTuple

import torch

from qcli.runtime import cpu

DTYPES = cpu.DTYPES | {torch.int8: 3}  # of a cache, as in kernels/cpu/cache.h
CACHE = "ppppqqqqq"  # the layout of a cache in a record


def token_stride(op: str, name: str, x: torch.Tensor, *shape: int) -> int:
    """The elements from one token of x to the next. A record then reads x where it is.

    Raises TypeError unless x is float32, and ValueError unless it is [tokens, *shape] on the CPU with the elements of a token side
    by side.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"{op}: {name} is {x.dtype}, expected float32")
    if not x.is_cpu:
        raise ValueError(f"{op}: {name} is on {x.device}, expected cpu")
    if x.shape[1:] != shape:
        raise ValueError(f"{op}: {name} is {list(x.shape)}, expected {['tokens', *shape]}")
    if len(x) and not x[0].is_contiguous():
        raise ValueError(f"{op}: {name} has strides {x.stride()}, expected the elements of a token side by side")
    return x.stride(0)


def token_rows(x: torch.Tensor) -> bool:
    """Whether the elements of a token of x [tokens, ...] lie side by side, as in a part of a fused product."""
    return x.dim() > 1 and (not len(x) or x[0].is_contiguous())


def vector(op: str, name: str, x: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """x, or None if there is none. Raises ValueError unless it is float32 [count] on the CPU."""
    return None if x is None else cpu.require(op, name, x, torch.float32, count)


def start_of(op: str, start: torch.Tensor, device: torch.device) -> torch.Tensor:
    """start, for a CUDA kernel. Raises ValueError unless it is one int64 on `device`."""
    if start.device != device or start.dtype != torch.int64 or start.numel() != 1:
        found = f"{list(start.shape)} of {start.dtype} on {start.device}"
        raise ValueError(f"{op}: start is {found}, expected one torch.int64 on {device}")
    return start


class Cache(NamedTuple):
    """The cache of keys and values of one layer.

    keys [kv_heads, capacity, head_dim], values [kv_heads, capacity, v_dim], both float32, bfloat16, float16 or int8. int8 comes
    with scales, float32 [kv_heads, capacity] each: a row is its int8 values times its scale. Position p is in slot p % capacity.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None

    @classmethod
    def checked(cls, op: str, keys, values, key_scales, value_scales) -> "Cache":
        """Raises TypeError for a dtype, and ValueError for sizes that do not fit or memory that is not contiguous."""
        for name, x in (("keys", keys), ("values", values)):
            if x.dtype not in DTYPES or x.dtype != keys.dtype:
                raise TypeError(f"{op}: {name} are {x.dtype}, expected float32, bfloat16, float16 or int8, the same for both")
            if x.dim() != 3 or x.shape[:2] != keys.shape[:2] or not x.numel():
                raise ValueError(f"{op}: {name} are {list(x.shape)}, expected [kv_heads, capacity, dim] with the sizes of keys")
        for name, x in (("key_scales", key_scales), ("value_scales", value_scales)):
            if (x is not None) != (keys.dtype == torch.int8):
                found = "missing" if x is None else "given"
                raise ValueError(f"{op}: {name} are {found}; scales belong to int8, and keys are {keys.dtype}")
            if x is not None and (x.dtype != torch.float32 or x.shape != keys.shape[:2]):
                raise ValueError(f"{op}: {name} are {x.dtype} {list(x.shape)}, expected float32 {list(keys.shape[:2])}")
        cache = cls(keys, values, key_scales, value_scales)
        for name, x in zip(("keys", "values", "key_scales", "value_scales"), cache):
            if x is not None and (x.device != keys.device or not x.is_contiguous()):
                raise ValueError(f"{op}: {name} have strides {x.stride()} on {x.device}, expected contiguous ones on {keys.device}")
        return cache

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def record(self, op: str) -> tuple:
        """The values of CACHE. Raises ValueError unless the cache is on the CPU."""
        if not self.keys.is_cpu:
            raise ValueError(f"{op}: keys are on {self.keys.device}, expected cpu")
        kv_heads, capacity, head_dim = self.keys.shape
        return *self, kv_heads, capacity, head_dim, self.values.shape[2], DTYPES[self.keys.dtype]
