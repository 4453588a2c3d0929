"""What every quantization method leaves behind for the executor."""

from dataclasses import dataclass, field

import torch


@dataclass
class ErrorSums:
    """Sums over the elements w of a weight and their stored values v: enough for relative error and SQNR."""

    squared_error: float = 0.0  # sum (w - v)^2
    squared_norm: float = 0.0  # sum w^2
    nonfinite: int = 0  # elements that are NaN or infinite; they are in neither sum


@dataclass
class Result:
    """What a stream leaves behind when it is finished: the remaining tensors by name, and the error sums."""

    tensors: dict[str, object]
    errors: ErrorSums = field(default_factory=ErrorSums)


def sum_squares(x: torch.Tensor) -> float:
    """sum x^2, accumulated in float64: squares of float32 values may leave its range."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2
