"""What most formats answer alike."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.errors import CheckpointError
from qcli.files.foreign_json import Kind, Required, check
from qcli.formats import Choice, Piece, Stored, Weight
from qcli.schemes import Scheme

if TYPE_CHECKING:
    import torch

    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

LOAD_ELSEWHERE = "Load it with transformers and the library that wrote it."


class Plain:
    """What holds of most formats: modules of their own, any shape, several schemes in one model, codes without gaps under
    the weights' own names, modules that hold all tensors. See Format for each method."""

    name: str
    rows_together = 1
    fields: Mapping[str, Kind | Required]  # of a quantization_config
    hint = LOAD_ELSEWHERE  # what to do about a quantization_config that is of another kind
    skip_list = "modules_to_not_convert"  # the field of a quantization_config that names what is not quantized

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        return None

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        return None

    def layout_of(self, scheme: Scheme) -> str:
        return self.name

    def pairs(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        return None

    def planes(self, stored: Stored, tensors: "Mapping[str, torch.Tensor]") -> "torch.Tensor | None":
        return None

    def file_apart(self, tensor: str) -> str | None:
        return None

    def owns(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("quant_method") == self.name)

    def check(self, config: Mapping[str, Any], label: str) -> None:
        check(config, self.fields, label, self.hint)

    def passes(self, config: Mapping[str, Any]) -> bool:
        """Whether a `quantization_config` passes `check`."""
        try:
            self.check(config, self.name)
        except CheckpointError:
            return False
        return True

    def weight_name(self, tensor: str) -> str:
        return tensor

    def parameters_in(self, info: "TensorInfo", scheme: Scheme, config: Mapping[str, Any] | None) -> int:
        return info.nbytes * 8 // scheme.bits

    def in_memory(self, spec: "TensorSpec | TensorInfo") -> bool:
        return True

    def in_module(self, spec: "TensorSpec | TensorInfo") -> bool:
        return self.in_memory(spec)

    def read(self, source: "Source", linears: Sequence[Linear], config: Mapping[str, Any]) -> dict[str, Stored]:
        from qcli.formats._reading import read_each

        return read_each(source, linears, partial(self.read_one, config))

    def read_one(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        """What is stored of one module; None where it is not quantized. Raises Problem (qcli/formats/_reading.py)."""
        raise NotImplementedError

    def config_of(self, config: Mapping[str, Any], tensor: str) -> Mapping[str, Any]:
        return config

    def attribute(self, name: str) -> str:
        return name

    def skipped(self, config: Mapping[str, Any]) -> list[str] | None:
        found: list[str] | None = config.get(self.skip_list)
        return found

    def renamings(self) -> list[tuple[str, str]]:
        return []


class ReadOnly(Plain):
    """A format that only others write: `refuses` says so, and the rest of writing is never asked for."""

    def refuses(self, scheme: Scheme) -> str | None:
        return f"{self.name}'s format is read, not written"

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        return self.refuses(head)

    def pack(self, weight: Weight, scheme: Scheme, parts: "Mapping[str, torch.Tensor]", start: int) -> Iterator[Piece]:
        raise NotImplementedError

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        raise NotImplementedError
