"""The lock files against pyproject.toml, and the environment against the one that it was made of."""

import re
import sys
import sysconfig
import tomllib
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
LINE = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[0-9a-z.]+)( ; (?P<marker>[^#]+?))?\s*(# via .+)?")
LOCKS = [ROOT / "locks" / f"{name}.txt" for name in ("tested", "oldest")]


def lines(lock: Path) -> list[str]:
    return [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]


def versions(lock: Path) -> dict[str, set[str]]:
    """The versions of each package; more than one where they differ by Python."""
    found: dict[str, set[str]] = {}
    for line in lines(lock):
        match = LINE.fullmatch(line)
        found.setdefault(match["name"], set()).add(match["version"])
    return found


def left_out(lock: Path) -> set[str]:
    """The packages that the lock's last lines name as left out."""
    _, _, after = lock.read_text().partition("excluded from the output:")
    return {line.removeprefix("# ") for line in after.splitlines() if line}


def direct() -> list[Requirement]:
    """What pyproject.toml asks for: to run, to test, to check and to build."""
    texts = PROJECT["project"]["dependencies"] + EXTRAS["test"] + EXTRAS["plot"] + EXTRAS["cluster"] + EXTRAS["dev"]
    texts += PROJECT["dependency-groups"]["build"] + PROJECT["build-system"]["requires"]
    return [made for made in map(Requirement, texts) if made.name != "qcli"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.stem)
def test_a_lock_holds_names_and_versions_alone(lock):
    assert all(LINE.fullmatch(line) for line in lines(lock))
    assert "make lock" in lock.read_text().splitlines()[1]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.stem)
def test_a_lock_holds_every_direct_dependency_at_an_admitted_version(lock):
    held = versions(lock)
    for requirement in direct():
        assert all(requirement.specifier.contains(v) for v in held[canonicalize_name(requirement.name)]), requirement


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.stem)
def test_a_lock_fetches_no_cuda_of_torchs(lock):
    asked_for = {canonicalize_name(requirement.name) for requirement in direct()}
    cuda = {name for name in versions(lock) if name.startswith(("nvidia-", "cuda-", "triton", "pytorch-triton"))}
    assert cuda <= asked_for
    assert left_out(lock) == set(PROJECT["tool"]["uv"]["pip"]["no-emit-package"])


def test_the_oldest_are_the_lower_ends_of_the_ranges():
    held = versions(ROOT / "locks" / "oldest.txt")
    for requirement in direct():
        lower = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        if lower:
            assert {Version(v) for v in held[canonicalize_name(requirement.name)]} == set(lower), requirement


def needed(name: str, extra: str, seen: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Adds to `seen` each (distribution, extra) that an installed distribution needs here, all the way down."""
    if (name, extra) not in seen:
        seen.add((name, extra))
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                for wanted in {"", *requirement.extras}:
                    needed(canonicalize_name(requirement.name), wanted, seen)
    return seen


def test_this_environment_is_the_locked_one():
    lock = Path(sys.prefix) / "installed"  # make leaves there what it installed from
    if not lock.is_file() or not lines(lock) or "make lock" not in lock.read_text():
        pytest.skip("make did not install this environment from a lock file")
    held = versions(lock)
    here = {
        canonicalize_name(d.metadata["Name"]): Version(d.version).public
        for d in distributions(path=[sysconfig.get_path("purelib")])
    }
    assert {name: v for name, v in here.items() if name in held and v not in held[name]} == {}
    closure = {name for name, _ in needed("qcli", "test", set())}
    assert closure - set(held) - left_out(lock) == {"qcli"}
