"""Where tensors are worked on."""

from qcli.errors import DeviceError, UsageError


def pick_device(device: str):
    """The torch.device for `auto`, `cpu` or `cuda`. Raises DeviceError, UsageError."""
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device is {device!r}, expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        built = "was built without CUDA" if torch.version.cuda is None else "finds no GPU"
        raise DeviceError(f"--device cuda: torch {torch.__version__} {built}", "Use --device cpu, or leave it out.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
