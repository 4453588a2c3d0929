"""Shared by the benchmarks: timing in turn, weights that no cache keeps, and the description of the machine."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle

import torch

from qcli.doctor import cpu_name
from qcli.runtime import cpu


def alternate(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function. The functions are called in turn, so a slow moment of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def copies(make: Callable[[], object], nbytes: int) -> Callable[[], object]:
    """A function that returns one copy after the other. Together the copies are four times as large as the last-level cache."""
    turns = cycle([make() for _ in range(max(2, -(-4 * cpu.last_level_cache() // nbytes)))])
    return lambda: next(turns)


def machine(*more: str) -> dict[str, object]:
    """The machine and the relevant versions. `more` names further packages."""
    packages = {}
    for package in ("torch", "bitsandbytes", "transformers", *more):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {
        "cpu": cpu_name(),
        "variant": cpu.variant(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": cpu.last_level_cache(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **packages,
    }
