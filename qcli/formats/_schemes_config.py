"""The schemes in the config of qcli's format, both ways: which fields a scheme has, and which weights are stored in it."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from qcli.errors import CheckpointError
from qcli.files.foreign_json import FLAG, Kind, Required, at_least, check, list_of, map_of, one_of, whole
from qcli.schemes import MOST_SPARSE, NAMED, QUANTIZED, Scheme

_SHAPE = list_of(whole(1), 2)
_SCHEME: Mapping[str, Kind | Required] = {
    "name": Required(one_of(*QUANTIZED)),
    "bits": Required(one_of(2, 3, 4, 8)),
    "share": Required(one_of("group", "row", "block", "tensor")),
    "size": whole(1, 1 << 30),
    "codebook": one_of("nf3", "table", "e4m3", "e2m1"),
    "zero_point": FLAG,
    "scale": one_of("float32", "float16", "model", "e8m0", "e4m3"),
    "activations": one_of("token", "tensor", "group"),
    "activation_codebook": one_of("e4m3", "e2m1"),
    "threshold": at_least(0),
    "sparse": Kind(f"a share from 0 to {MOST_SPARSE}", lambda v: at_least(0).fits(v) and not at_least(MOST_SPARSE + 1e-9).fits(v)),
    "weights": Required(map_of(_SHAPE)),
}
_BITS_OF = {"nf3": (3,), "table": (2, 3, 4), "e2m1": (4,), "e4m3": (8,), None: (2, 3, 4, 8)}
_HINT = "Mend the file, or quantize the model again."


def described(scheme: Scheme, weights: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The entry of a scheme: the fields that are not those of a plain one, and the weights [out_features, in_features] that are
    stored in it, by the names of their tensors."""
    own = {f.name: getattr(scheme, f.name) for f in fields(scheme) if f.name != "method"}
    plain = Scheme("", "", 0)
    kept = {name: value for name, value in own.items() if name in ("name", "bits", "share") or value != getattr(plain, name)}
    return kept | {"weights": {name: list(shape) for name, shape in sorted(weights.items())}}


def entry_of(weight: str, config: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The entry that lists the tensor `weight`, in a config that may be unchecked."""
    entries = (config or {}).get("schemes")
    for entry in entries if isinstance(entries, list) else ():
        weights = entry.get("weights") if isinstance(entry, dict) else None
        if isinstance(weights, dict) and weight in weights:
            found: Mapping[str, Any] = entry
            return found
    return None


def shape_of(weight: str, config: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """The shape [out_features, in_features] of a weight that an unchecked config lists; None where it lists none."""
    entry = entry_of(weight, config)
    shape: Any = entry["weights"][weight] if entry else None
    return (shape[0], shape[1]) if _SHAPE.fits(shape) else None


def scheme_in(entry: Mapping[str, Any]) -> Scheme:
    """The scheme of a checked entry."""
    own = {name: value for name, value in entry.items() if name in _SCHEME and name != "weights" and value is not None}
    own |= {name: float(own[name]) for name in ("threshold", "sparse") if name in own}
    return Scheme(method=NAMED[own["name"]].method, **own)


def check_entry(entry: Mapping[str, Any], label: str) -> None:
    """Raises CheckpointError for fields that are wrong, and for those that do not fit together."""
    check(entry, _SCHEME, label, _HINT)
    if others := [name for name in entry if name not in _SCHEME]:
        raise CheckpointError(f"{label} has a field {others[0]!r}, which this qcli does not know", "Install a newer qcli.")
    scheme = scheme_in(entry)
    if scheme.bits not in _BITS_OF[scheme.codebook]:
        raise CheckpointError(f"{label} has codes of {scheme.codebook or 'integers'} in {scheme.bits} bits", _HINT)
    if (scheme.share in ("group", "block")) != bool(scheme.size):
        raise CheckpointError(f"{label} has a scale for each {scheme.share}, and a size of {scheme.size}", _HINT)
    if scheme.codebook and (scheme.zero_point or scheme.threshold):
        raise CheckpointError(f"{label} has zero points or a threshold beside {scheme.codebook}", _HINT)
    if (scheme.codebook == "e2m1") != (scheme.scale in ("e8m0", "e4m3")):
        raise CheckpointError(f"{label} has scales in {scheme.scale} for codes of {scheme.codebook or 'integers'}", _HINT)
    in_table = scheme.codebook == "table"
    if in_table and (scheme.share != "row" or scheme.activations or scheme.scale not in ("float16", "float32")):
        raise CheckpointError(
            f"{label} has tables for each {scheme.share} in {scheme.scale}, expected rows in float16 or float32", _HINT
        )
    if not in_table and (scheme.sparse or scheme.scale == "float16"):
        raise CheckpointError(f"{label} has a sparse share or scales in float16 without a table", _HINT)
    if scheme.activation_codebook and not scheme.activations:
        raise CheckpointError(f"{label} has an activation_codebook, and rounds no activations", _HINT)


def check_all(entries: Iterable[object], label: str) -> None:
    """`check_entry` of each, and that no weight is listed twice."""
    known: set[str] = set()
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise CheckpointError(f"{label}[{number}] is no object", _HINT)
        check_entry(entry, f"{label}[{number}]")
        if twice := known & entry["weights"].keys():
            raise CheckpointError(f"{label} lists {min(twice)} twice", _HINT)
        known |= entry["weights"].keys()
