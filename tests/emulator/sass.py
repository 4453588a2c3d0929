"""Inspects the code that nvcc made of a kernel: registers, spills, and the instructions of its loops."""

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

_SECTION = re.compile(r"^\.text\.(\w+):")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")


@cache
def nvdisasm() -> str | None:
    """The disassembler, from the toolkit or from the nvidia-cuda-nvdisasm package."""
    packaged = sorted(Path(sysconfig.get_paths()["purelib"], "nvidia").glob("*/bin/nvdisasm"))
    return shutil.which("nvdisasm") or next(map(str, packaged), None)


def usage(ptxas: str) -> dict[str, dict[str, int]]:
    """Registers, and bytes spilled to local memory, of each kernel in the output of `nvcc -Xptxas -v`."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        ptxas,
        re.DOTALL,
    )
    return {name: {"registers": int(n), "spilled": int(stores) + int(loads)} for name, stores, loads, n in found}


def loops(cubin: Path) -> dict[str, list[Counter]]:
    """The innermost loops of every kernel in an image, each as a count of its instructions."""
    text = subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[Counter]] = {}
    for kernel, lines in _kernels(text).items():
        mnemonics, labels, spans = [], {}, []
        for line in lines:
            if label := _LABEL.match(line):
                labels[label[1]] = len(mnemonics)
            elif instruction := _INSTRUCTION.search(line):
                mnemonics.append(instruction[1])
                branch = _BRANCH.search(line)
                if branch and branch[1] in labels:  # a jump backwards: a loop
                    spans.append((labels[branch[1]], len(mnemonics)))
        innermost = [s for s in spans if not any(s != o and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        found[kernel] = [Counter(mnemonics[begin:end]) for begin, end in innermost]
    return found


def _kernels(text: str) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if section := _SECTION.match(line.strip()):
            lines = sections.setdefault(section[1], [])
        lines.append(line.strip())
    return sections
