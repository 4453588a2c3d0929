"""The options of methods whose codes texts may decide. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, cast

from qcli.errors import UsageError
from qcli.schemes import ROUNDINGS, TOKEN_WEIGHTS, TRANSFORMS, Scheme

if TYPE_CHECKING:
    import torch

    from qcli.methods._factors import Factors, Inputs
    from qcli.methods._grid import Grid

Needs = Literal["nothing", "moments", "hessian", "tokens", "fisher"]
"""What a method must know of a module: nothing; of its inputs E[x^2] of each channel, or sum x x^T besides, or the inputs of some
tokens; or the Fisher information of its weight."""


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """How codes are chosen under their scales: each to "nearest", or by "gptq", how much the latter damps its Hessian, and whether
    tokens count by the "fisher" information at the outputs."""

    rounding: str = ROUNDINGS[0]
    damping: float = 0.2
    weights: str = TOKEN_WEIGHTS[0]

    changes_inputs: ClassVar[bool] = False  # whether it divides the inputs of modules by factors. See qcli.methods._factors

    def check_rounding(self) -> None:
        """Raises UsageError for options that there are not."""
        if self.rounding not in ROUNDINGS:
            raise UsageError(f"rounding is {self.rounding!r}, expected {' or '.join(ROUNDINGS)}")
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping is {self.damping}, expected a share above 0, and at most 1")
        if self.weights not in TOKEN_WEIGHTS:
            raise UsageError(f"weights is {self.weights!r}, expected {' or '.join(TOKEN_WEIGHTS)}")

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


@dataclass(frozen=True, kw_only=True)
class Scaled(Calibrated):
    """Whether columns are scaled before they are rounded, and inputs divided by the same factors: "awq" finds them."""

    transform: str = TRANSFORMS[0]

    steps: ClassVar[int] = 10  # exponents that are tried

    def check_rounding(self) -> None:
        """Raises UsageError for options that there are not."""
        super().check_rounding()
        if self.transform not in TRANSFORMS:
            raise UsageError(f"transform is {self.transform!r}, expected {' or '.join(TRANSFORMS)}")

    @property
    def changes_inputs(self) -> bool:  # type: ignore[override]
        """Whether it divides the inputs of modules by factors."""
        return self.transform == "awq"

    @property
    def needs(self) -> Needs:
        """What it must know of the inputs of a module."""
        return "hessian" if self.changes_inputs else super().needs

    def by_texts(self) -> Self:
        """The same method with all that calibration gives it."""
        return replace(super().by_texts(), transform="awq")

    def without_texts(self) -> Self:
        """The same method by the weights alone."""
        return replace(super().without_texts(), transform=TRANSFORMS[0])

    def factors(self, inputs: Inputs, weights: Sequence[torch.Tensor]) -> Factors:
        """The best factors of inputs that modules with these weights [out_features, in_features] read."""
        from qcli.methods._factors import awq_factors

        return awq_factors(cast(Calibratable, self), inputs, weights, self.steps)


class Calibratable(Protocol):
    """A method that has a grid. `Calibrated` has the rest of it."""

    needs: Needs
    rounding: str
    damping: float

    @property
    def scheme(self) -> Scheme:
        """What a weight is stored as."""
        ...

    def grid(self, weight: torch.Tensor, importance: torch.Tensor | None, absmax: float) -> Grid:
        """The scales of a weight [out_features, in_features] in the dtype in which it enters, and what codes may stand for.
        importance float32 [in_features] says what an error costs in each column, where the search asks for it. `absmax` as in
        Method.encoder."""
        ...
