"""What a linear layer computes under each method of LLM.int8()'s Table 1 (arXiv:2208.07339) and in 4 bits, on any device, in
float32. One family of methods is one file here.
"""

import difflib
import re
from collections.abc import Iterable

from qcli.errors import UsageError
from qcli.simulation import absmax, blockwise, llm_int8, unquantized, zeropoint
from qcli.simulation._base import Prepared, Simulation

__all__ = ["SIMULATIONS", "Prepared", "Simulation", "chosen", "simulation"]

SIMULATIONS: dict[str, Simulation] = {
    method.name: method for family in (unquantized, absmax, zeropoint, llm_int8, blockwise) for method in family.SIMULATIONS
}


def simulation(name: str) -> Simulation:
    """The method of that name, whatever its case and punctuation; "int8" before it may be left out. Raises UsageError."""
    known = {_plain(each): method for each, method in SIMULATIONS.items()}
    wanted = _plain(name)
    for spelling in (wanted, f"int8{wanted}"):
        if spelling in known:
            return known[spelling]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    nearest = f"; nearest: {', '.join(known[each].name for each in near)}" if near else ""
    raise UsageError(f"there is no method {name!r}{nearest}", f"Methods: {', '.join(SIMULATIONS)}.")


def chosen(names: str | Iterable[str]) -> list[Simulation]:
    """The methods of a list, or of names with commas between them; "all" is all. In the order of SIMULATIONS, each once, and the
    unquantized one always. Raises UsageError."""
    names = names.split(",") if isinstance(names, str) else list(names)
    every = any(_plain(name) == "all" for name in names)
    wanted = {simulation(name).name for name in names if _plain(name) != "all"} | {unquantized.SIMULATIONS[0].name}
    return [method for name, method in SIMULATIONS.items() if every or name in wanted]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
