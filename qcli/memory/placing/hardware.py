"""GPUs by name or size: how much memory each has for a program, and what the driver reports of those in this machine."""

import difflib
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from qcli.errors import DeviceError, UsageError
from qcli.sizes import format_bytes, parse_size

GIB = 2**30
# GiB that CUDA (ROCm for the MI300X) reports as the device's total. That is less than in the name: the driver keeps a part, and
# error correction takes 1/16 of GDDR memory where it is on (T4, A10, L4, L40S, RTX A and Ada workstation cards).
_KNOWN = {
    "gtx1080ti": 10.91,
    "rtx2080ti": 10.75,
    "rtx3060": 11.76,
    "rtx3080": 9.77,
    "rtx3090": 23.69,
    "rtx4060ti-16": 15.70,
    "rtx4070": 11.99,
    "rtx4080": 15.70,
    "rtx4090": 23.64,
    "rtx5070": 11.50,
    "rtx5070ti": 15.46,
    "rtx5080": 15.47,
    "rtx5090": 31.36,
    "rtxpro6000": 94.97,
    "rtxa4000": 15.73,
    "rtxa5000": 23.68,
    "rtxa6000": 47.43,
    "rtx6000ada": 47.50,
    "p100": 15.89,
    "v100-16": 15.77,
    "v100-32": 31.73,
    "t4": 14.56,
    "a10": 21.99,
    "a10g": 21.99,
    "l4": 22.03,
    "a40": 44.42,
    "l40s": 44.40,
    "a100-40": 39.39,
    "a100-80": 79.15,
    "h100": 79.10,
    "h100nvl": 93.11,
    "h200": 139.80,
    "b200": 178.35,
    "mi300x": 191.98,
}
_ALIASES = {
    "colab": "t4",
    "colabpro": "l4",
    "kaggle": "t4",
    "v100": "v100-16",
    "a6000": "rtxa6000",
    "a5000": "rtxa5000",
    "a4000": "rtxa4000",
    "a100": "a100-40",
    "h100-80": "h100",
    "titanrtx": "rtx3090",
    "1080ti": "gtx1080ti",
    "2080ti": "rtx2080ti",
    "rtx4060ti": "rtx4060ti-16",
}


@dataclass(frozen=True)
class Gpu:
    """A device to place a model on. `memory` is the bytes that a program may have there. `said` is a sentence on their source."""

    name: str
    memory: int
    said: str

    @property
    def is_hopper(self) -> bool:
        """Whether it has compute capability 9.0, by its name."""
        return re.search(r"gh?[12]00|h[12]00", self.name.lower()) is not None


def names() -> list[str]:
    """The names in the table."""
    return sorted(_KNOWN)


def gpus(given: list[str]) -> list[Gpu]:
    """The devices that `--gpu` names: 24GB (1e9), 24GiB (2^30), rtx4090, 8xa100-80, auto. Several add up.

    Raises UsageError for what is neither a size nor a name, DeviceError where `auto` finds no GPU.
    """
    found: list[Gpu] = []
    for text in given:
        count, one = _times(text)
        if one.strip().lower() == "auto":
            found += count * _present()
        else:
            found += count * [_gpu(one)]
    return found


def _times(text: str) -> tuple[int, str]:
    match = re.fullmatch(r"\s*(\d{1,3})\s*[x*×]\s*(\S.*)", text, re.IGNORECASE)
    if match and int(match[1]) == 0:
        raise UsageError(f"--gpu {text!r} counts no GPU, expected 1 or more")
    return (int(match[1]), match[2]) if match else (1, text)


def _gpu(text: str) -> Gpu:
    name = _known_name(text)
    if name is not None:
        memory = int(_KNOWN[name] * GIB)
        return Gpu(name, memory, f"{name} has {_KNOWN[name]:.2f} GiB ({format_bytes(memory)}) for programs")
    if not re.fullmatch(r"\s*\d+(\.\d+)?\s*[KMGT]i?B\s*", text, re.IGNORECASE):
        near = difflib.get_close_matches(_plain(text), names(), n=3, cutoff=0.5)
        raise UsageError(
            f"--gpu is {text!r}, neither a size nor a name in the table" + (f"; nearest: {', '.join(near)}" if near else ""),
            f"Write a size as 24GB (1e9) or 24GiB (2^30), or auto, or one of: {', '.join(names())}.",
        )
    memory = parse_size(text, "--gpu")
    if memory == 0:
        raise UsageError(f"--gpu is {text!r}, expected more than 0 bytes")
    unit = "GiB, 2^30 bytes" if "ib" in text.lower() else "GB, 1e9 bytes"
    size = memory / (GIB if "ib" in text.lower() else 10**9)
    return Gpu(text.strip(), memory, f"{text.strip()} was read as {size:g} {unit} each")


def _plain(text: str) -> str:
    """A name without its maker, its spelling and the unit of its size: "NVIDIA A100 80GB" is "a100-80"."""
    words = re.sub(r"nvidia|geforce|tesla|quadro|pcie|sxm\d?|\bgb\b", " ", text.lower())
    words = re.sub(r"(\d)\s*gi?b\b", r"\1", words)
    return re.sub(r"[^a-z0-9]", "", words)


def _known_name(text: str) -> str | None:
    every = {_plain(name): name for name in _KNOWN} | {_plain(alias): name for alias, name in _ALIASES.items()}
    plain = _plain(text)
    return every.get(plain) or every.get("rtx" + plain)


def _present() -> list[Gpu]:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES allows, with what is free on each."""
    if not shutil.which("nvidia-smi"):
        raise DeviceError(
            "--gpu auto: this machine has no nvidia-smi, which reports the GPUs",
            "Give the memory instead, such as --gpu 24GB or --gpu rtx4090.",
        )
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        query.append(f"--id={visible}")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise DeviceError(f"--gpu auto: nvidia-smi did not answer ({e})", "Give the memory instead.") from e
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not lines or visible == "":
        said = (done.stdout or done.stderr).strip().splitlines()
        why = "CUDA_VISIBLE_DEVICES hides every GPU" if visible == "" else (said[0] if said else "it listed none")
        raise DeviceError(f"--gpu auto: nvidia-smi shows no GPU ({why})", "Give the memory instead: --gpu 24GB.")
    return [_line(line) for line in lines]


def _line(line: str) -> Gpu:
    parts = [part.strip() for part in line.rsplit(",", 2)]
    if len(parts) != 3 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        raise DeviceError(f"--gpu auto: nvidia-smi answered {line!r}, expected name, total and free MiB")
    name, (total, free) = parts[0], (int(part) << 20 for part in parts[1:])
    return Gpu(name, free, f"{name} has {format_bytes(free)} free of {format_bytes(total)}")
