"""The options of methods whose codes texts may decide. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

from qcli.errors import UsageError
from qcli.schemes import ROUNDINGS

if TYPE_CHECKING:
    import torch

    from qcli.methods._grid import Grid

Needs = Literal["nothing", "moments", "hessian", "tokens"]
"""What a method must know of the inputs of a module: nothing, E[x^2] of each channel, or sum x x^T besides, or the inputs of some
tokens."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """How codes are chosen under their scales: each to "nearest", or by "gptq", and how much the latter damps its Hessian."""

    rounding: str = ROUNDINGS[0]
    damping: float = 0.01

    def check_rounding(self) -> None:
        """Raises UsageError for options that there are not."""
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding is {self.rounding!r}, expected {' or '.join(ROUNDINGS)}")
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping is {self.damping}, expected a share of the mean diagonal above 0, and at most 1")

    @property
    def needs(self) -> Needs:
        """What it must know of the inputs of a module."""
        if self.rounding == "gptq":
            return "hessian"
        return "moments" if getattr(self, "search", "") == "imatrix" else "nothing"

    def by_texts(self) -> Self:
        """The same method with all that calibration gives it."""
        changed: dict[str, Any] = {"search": "imatrix"} if hasattr(self, "search") else {}
        return replace(self, rounding="gptq", **changed)

    def without_texts(self) -> Self:
        """The same method by the weights alone: as it is where nothing else was asked for."""
        changed: dict[str, Any] = {"search": "none"} if getattr(self, "search", "") == "imatrix" else {}
        return replace(self, rounding=ROUNDINGS[0], **changed)


class Calibratable(Protocol):
    """A method that has a grid. `Calibrated` has the rest of it."""

    needs: Needs
    rounding: str
    damping: float

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """The scales of a weight [out_features, in_features] in the dtype in which it enters, and what codes may stand for.
        importance float32 [in_features] says what an error costs in each column, where the search asks for it. `absmax` as in
        Method.encoder."""
        ...
