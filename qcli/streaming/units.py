"""Which weights of a model are loaded and dropped together: each block, and each module around the blocks."""

from dataclasses import dataclass, field

from torch import nn

from qcli.checkpoint.safetensors_file import TensorInfo


@dataclass
class Unit:
    """A module whose weights are loaded together. `index` counts the blocks; it is None for the modules around them.

    `tensors` are those of the checkpoint that it needs. `ties` are parameters that belong to another module: (own name, that name).
    A `resident` unit stays in memory, since it contains others.
    """

    name: str
    module: nn.Module
    index: int | None = None
    resident: bool = False
    tensors: list[TensorInfo] = field(default_factory=list)
    ties: list[tuple[str, str]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors as stored."""
        return sum(info.nbytes for info in self.tensors)

    def weights(self) -> list[tuple[str, nn.Module, str]]:
        """(full name, module that holds it, name there) of each parameter and stored buffer."""
        prefix = f"{self.name}." if self.name else ""
        found = []
        for path, module in self.module.named_modules() if self.index is not None else [("", self.module)]:
            at = f"{prefix}{path}." if path else prefix
            own = {"recurse": False, "remove_duplicate": False}
            stored = [n for n, _ in module.named_buffers(**own) if n not in module._non_persistent_buffers_set]
            names = [n for n, _ in module.named_parameters(**own)] + stored
            found += [(at + name, module, name) for name in names]
        return found


def find_units(model: nn.Module) -> list[Unit]:
    """The units of a model. The outermost module lists are its blocks; each module with weights outside of them is a unit too."""
    blocks: list[Unit] = []
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and _holds_blocks(module):
            lists.append(name)
            for i, child in enumerate(module):
                blocks.append(Unit(f"{name}.{i}", child, len(blocks)))
    in_blocks = {id(m) for block in blocks for m in block.module.modules()}
    around = []
    for name, module in model.named_modules():
        if id(module) in in_blocks:
            continue
        unit = Unit(name, module)
        if unit.weights():
            unit.resident = any(True for _ in module.children())
            around.append(unit)
    return around + blocks


def _holds_blocks(modules: nn.ModuleList) -> bool:
    """Whether a list holds blocks, and not bare layers, as some models have around their blocks."""
    return any(True for child in modules for _ in child.children()) and next(modules.parameters(), None) is not None
