"""Rare options, given as name=value, checked against the dataclass that takes them."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields

from qcli import methods
from qcli.checkpoint import dtypes
from qcli.errors import UsageError, one_of
from qcli.sizes import parse_size


@dataclass(frozen=True)
class Settings:
    """Rarer settings, given as name=value. Sizes are decimal: 5GB is 5e9 bytes, 5GiB is 5 * 2^30."""

    max_shard_size: str = "5GB"
    compute_dtype: str = "auto"
    allow_nonfinite: bool = False
    modules: str = "model"  # which modules are linear: as the transformers model says, or by name and shape ("rules")

    def __post_init__(self):
        if parse_size(self.max_shard_size, "max_shard_size") <= 0:
            raise UsageError("max_shard_size is 0, expected a size such as 5GB")
        one_of("compute_dtype", self.compute_dtype, ("auto", *dtypes.MODEL_DTYPES))
        one_of("modules", self.modules, ("model", "rules"))


def split_settings(method: str, settings: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Sorts name=value settings into the method's options and the run's, converting text. Raises UsageError."""
    known_method = {f.name: f.type for f in fields(methods.method_class(method))}
    known_run = {f.name: f.type for f in fields(Settings)}
    of_method, of_run = {}, {}
    for name, value in settings.items():
        if name not in known_method and name not in known_run:
            every = [*known_method, *known_run]
            near = difflib.get_close_matches(name, every, n=2, cutoff=0.4) or every
            raise UsageError(f"{method} has no setting {name!r}; nearest: {', '.join(near)}", f"Settings: {', '.join(every)}.")
        target, kind = (of_method, known_method[name]) if name in known_method else (of_run, known_run[name])
        target[name] = _convert(name, value, kind)
    return of_method, of_run


def _convert(name: str, value: object, kind: type) -> object:
    if not isinstance(value, str) or kind is str:
        return value
    if kind is bool:
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        raise UsageError(f"{name} is {value!r}, expected true or false")
    try:
        return kind(value)
    except ValueError:
        raise UsageError(f"{name} is {value!r}, expected {'a whole number' if kind is int else 'a number'}") from None
