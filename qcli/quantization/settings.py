"""Rare options, given as name=value, checked against the dataclass that takes them."""

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields

from qcli.calibration.settings import ORDERS
from qcli.checkpoint import dtypes
from qcli.errors import UsageError, one_of
from qcli.sizes import parse_size


@dataclass(frozen=True)
class Settings:
    """Rarer settings, given as name=value. Sizes are decimal: 5GB is 5e9 bytes, 5GiB is 5 * 2^30."""

    max_shard_size: str = "5GB"
    compute_dtype: str = "auto"
    allow_nonfinite: bool = False
    sequence_length: int = 0  # tokens of a window of the calibration; 0 is the model's own, up to 2048
    order: str = ORDERS[0]  # whether a calibrated block sees the blocks before it as rounded, or as they were
    modules: str = "model"  # which modules are linear: as the transformers model says, or by name and shape ("rules")

    def __post_init__(self) -> None:
        if parse_size(self.max_shard_size, "max_shard_size") <= 0:
            raise UsageError("max_shard_size is 0, expected a size such as 5GB")
        one_of("compute_dtype", self.compute_dtype, ("auto", *dtypes.MODEL_DTYPES))
        one_of("order", self.order, ORDERS)
        one_of("modules", self.modules, ("model", "rules"))


SETTINGS = {field.name: typing.get_type_hints(Settings)[field.name] for field in fields(Settings)}


def run_settings(given: Mapping[str, object]) -> Settings:
    """Settings of a run, by name. Raises UsageError."""
    return Settings(**given)  # type: ignore[arg-type]
