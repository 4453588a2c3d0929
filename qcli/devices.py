"""Which device computes, and on which devices the parts of a model are placed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qcli.errors import DeviceError, UsageError
from qcli.sizes import format_bytes, parse_size


def pick_device(device: str):
    """The torch.device that `auto`, `cpu` or `cuda` means. Raises DeviceError, UsageError."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {device!r}, expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise DeviceError(f"--device cuda: torch {torch.__version__} {built}", "Use --device cpu, or leave it out.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class DeviceChoice:
    """The devices for the modules of a model, as arguments of transformers' from_pretrained. `max_memory` maps a GPU's index or
    "cpu" to bytes."""

    device_map: object
    max_memory: dict[int | str, int] | None = None

    @property
    def splits(self) -> bool:
        """Whether a device map was asked for."""
        return self.device_map == "auto" or set(self.device_map) != {""}

    def arguments(self) -> dict[str, object]:
        """The arguments for from_pretrained."""
        given = {} if self.max_memory is None else {"max_memory": dict(self.max_memory)}
        return {"device_map": self.device_map} | given

    def gpus(self) -> list[int]:
        """The indexes of the GPUs that may be used."""
        import torch

        if self.device_map != "auto":
            return _gpus(self.device_map.values())
        return _gpus(range(torch.cuda.device_count()) if self.max_memory is None else self.max_memory)

    def limits(self) -> str:
        """The user's limits, in words."""
        if self.device_map != "auto":
            return "where the device map puts them"
        if self.max_memory is None:
            return "what is free on the GPUs and the CPU"
        names = {name: "the CPU" if name == "cpu" else f"GPU {name}" for name in self.max_memory}
        given = ", ".join(f"{format_bytes(size)} on {names[name]}" for name, size in self.max_memory.items())
        return given if len(names) < 2 else f"{given}, which must leave room for the largest layer that moves between them"


def place(device: str, device_map: str | dict | None, max_memory: str | Mapping[int | str, int | str] | None) -> DeviceChoice:
    """The choice from `--device`, `--device-map` (auto, or a dict of module to device) and `--max-memory`.

    Raises UsageError, DeviceError.
    """
    if device_map is None:
        if max_memory is not None:
            raise UsageError("--max-memory was given without --device-map", "Add --device-map auto.")
        return DeviceChoice({"": pick_device(device)})
    if device != "auto":
        raise UsageError(f"--device {device} and --device-map were both given", "Leave out one of the two.")
    if isinstance(device_map, dict):
        if max_memory is not None:
            raise UsageError("max_memory was given with a device_map that names every device", "Leave out one.")
        return DeviceChoice(device_map)
    if device_map != "auto":
        raise UsageError(f"--device-map is {device_map!r}, expected auto")
    return DeviceChoice("auto", None if max_memory is None else parse_max_memory(max_memory))


def never_fails(device: str, device_map: object, max_memory: object) -> bool:
    """Whether `place` takes these without an error. Then it, which loads torch, can wait until the model's files are checked."""
    return device in ("auto", "cpu") and device_map is None and max_memory is None


def parse_max_memory(text: str | Mapping[int | str, int | str]) -> dict[int | str, int]:
    """Bytes per GPU index or "cpu", from "0=20GB,cpu=30GB" or a dict of the same. Raises UsageError, DeviceError."""
    import torch

    hint = "Write it as 0=20GB,1=20GiB,cpu=30GB, with GPUs by number."
    entries = text.items() if isinstance(text, Mapping) else [e.partition("=")[::2] for e in text.split(",")]
    limits: dict[int | str, int] = {}
    for name, size in entries:
        name = str(name).strip()
        if name != "cpu" and not name.isdecimal():
            raise UsageError(f"--max-memory names the device {name!r}, expected a GPU's number or cpu", hint)
        if str(size).strip() == "":
            raise UsageError(f"--max-memory has no size for {name}", hint)
        key = name if name == "cpu" else int(name)
        if key in limits:
            raise UsageError(f"--max-memory names {name} twice", hint)
        limits[key] = parse_size(str(size), f"--max-memory of {name}")
    count = torch.cuda.device_count()
    missing = [key for key in limits if key != "cpu" and key >= count]
    if missing:
        there = "there is none" if not count else f"there are {count}, from 0 on" if count > 1 else "there is only GPU 0"
        raise DeviceError(f"--max-memory names GPU {missing[0]}, but {there}", "Name a GPU that `qcli doctor` shows.")
    return limits


def gpus_of(model) -> list[int]:
    """The indexes of the GPUs on which a loaded transformers model is."""
    places = getattr(model, "hf_device_map", None) or {"": model.device}
    return _gpus(places.values())


def _gpus(places: Iterable[object]) -> list[int]:
    import torch

    found = set()
    for name in places:
        if isinstance(name, str) and not name.startswith("cuda"):
            continue
        device = torch.device("cuda", name) if isinstance(name, int) else torch.device(name)
        if device.type == "cuda":
            found.add(torch.cuda.current_device() if device.index is None else device.index)
    return sorted(found)
