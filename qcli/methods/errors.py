"""What quantizing a weight cost: sums of squares, which add up over chunks, modules and kinds of module."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass
class ErrorSums:
    """Sums over the elements w of a weight and their stored values v."""

    squared_error: float = 0.0  # sum (w - v)^2
    squared_norm: float = 0.0  # sum w^2
    nonfinite: int = 0  # elements that are NaN or infinite; they are in neither sum

    @property
    def relative_error(self) -> float:
        """||w - v|| / ||w||."""
        return math.sqrt(max(self.squared_error, 0) / self.squared_norm) if self.squared_norm > 0 else 0.0

    @property
    def sqnr(self) -> float | None:
        """10 log10(||w||^2 / ||w - v||^2) in dB; None where nothing was lost or there was nothing to lose."""
        return decibels(self.squared_norm, self.squared_error)


def decibels(signal: float, error: float) -> float | None:
    """10 log10(signal / error); None where one of them is zero."""
    return 10 * math.log10(signal / error) if signal > 0 and error > 0 else None


def add_up(sums: Mapping[int, Sequence[float]]) -> ErrorSums:
    """Squared error, squared norm and non-finite elements of chunks, by where each begins. They are added in that order, since
    threads finish them in any."""
    total = ErrorSums()
    for _, (error, norm, nonfinite) in sorted(sums.items()):
        total.squared_error += error
        total.squared_norm += norm
        total.nonfinite += int(nonfinite)
    return total
