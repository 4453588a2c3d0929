"""Sums in which the order of additions does not show, so that parts of a text may be added up on several machines."""

import torch


class WideSum:
    """A sum of float64 tensors [*shape], kept with what rounding cost it (two-sum: Knuth, The Art of Computer Programming, 4.2.2).

    It holds twice the digits of float64. `value` is therefore the exact sum rounded once, in whatever order and in whatever groups
    its terms came. Another order may show where the exact sum lies between two float64 numbers to 15 more digits.
    """

    def __init__(self, *shape: int):
        self._high, self._low = torch.zeros(2, *shape, dtype=torch.float64)

    def add(self, term: torch.Tensor) -> None:
        """Adds a term [*shape], float64."""
        total = self._high + term
        added = total - self._high
        self._low = self._low + ((self._high - (total - added)) + (term - added))
        self._high = total

    def merge(self, other: "WideSum") -> None:
        """Adds all terms of another sum."""
        self.add(other._high)
        self._low = self._low + other._low

    @property
    def value(self) -> torch.Tensor:
        """The sum, float64 [*shape]. What overflows is NaN."""
        return self._high + self._low
