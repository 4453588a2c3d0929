"""What tells this installation of qcli from another: machines that work together must have the same."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qcli import __version__

_LIBRARIES = ("torch", "transformers", "safetensors")


@cache
def fingerprint() -> dict[str, str]:
    """The versions of qcli and of what its results depend on, and sha256 of its sources and its compiled kernels for CPUs."""
    package, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.so")]):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return {
        "qcli": __version__,
        "sources": digest.hexdigest()[:16],
        "Python": platform.python_version(),
        **{name: _version(name) for name in _LIBRARIES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def difference(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """The first thing in which two fingerprints differ, in words; None where they are the same."""
    for name, value in ours.items():
        if theirs.get(name) != value:
            what = "qcli of other sources" if name == "sources" else f"{name} {theirs.get(name, 'unknown')}"
            return f"{what}, and here it is {'' if name == 'sources' else f'{name} '}{value if name != 'sources' else 'another'}"
    return None
