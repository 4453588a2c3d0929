"""What every quantization method leaves behind for the executor."""

from dataclasses import dataclass, field


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


def add_up(sums: dict[int, list[float]]) -> ErrorSums:
    """Squared error, squared norm and non-finite elements of chunks, by where they begin, added up in
    that order, for threads finish them in any."""
    total = ErrorSums()
    for _, (error, norm, nonfinite) in sorted(sums.items()):
        total.squared_error += error
        total.squared_norm += norm
        total.nonfinite += int(nonfinite)
    return total
