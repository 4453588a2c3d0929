"""What most formats answer alike."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcli.formats import Stored
from qcli.schemes import Scheme

if TYPE_CHECKING:
    import torch


class Plain:
    """What holds of most formats: modules of their own, several schemes in one model, no codes of 4 bits two a byte."""

    name: str

    def layout_of(self, scheme: Scheme) -> str:
        """See Format."""
        return self.name

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        """See Format."""
        return None

    def file_apart(self, tensor: str) -> str | None:
        """See Format."""
        return None

    def config_of(self, config: Mapping[str, Any], tensor: str) -> Mapping[str, Any]:
        """See Format."""
        return config

    def pairs(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        """See Format."""
        return None

    def planes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        """See Format."""
        return None
