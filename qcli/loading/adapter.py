"""Reads a LoRA adapter (arXiv:2106.09685) from a folder or a hub repository in PEFT's layout, without PEFT.

An adapter gives linear modules two thin matrices, A [r, in_features] and B [out_features, r]. A module then computes
y = W x + bias + scaling B A x, with scaling = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732). Whatever else PEFT can
store and would change the result is refused by its name.
"""

import hashlib
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qcli.checkpoint import dtypes
from qcli.checkpoint.carried import tokenizer_files
from qcli.checkpoint.layout import Layout
from qcli.checkpoint.safetensors_file import DAMAGED, TensorInfo, read_header_with, read_into
from qcli.checkpoint.source import Source, open_place
from qcli.errors import CheckpointError, NonFiniteError, QcliWarning, UsageError, together
from qcli.files.foreign_json import OBJECT, TEXT, Required, check, read_object
from qcli.loading.adapter_config import CONFIG, WITH_PEFT, check_config, refused
from qcli.recipe import Recipe, recipe_of

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OF_BASE = {"name": Required(TEXT), "revision": TEXT, "fingerprint": Required(TEXT)}
# The ends of other tensors' names, and what they belong to.
_OTHERS = {
    "lora_embedding_A": "an adapter of an embedding",
    "lora_embedding_B": "an adapter of an embedding",
    "lora_magnitude_vector": "DoRA",
    "lora_magnitude_vector.weight": "DoRA",
    "lora_B.bias": "a bias of its own",
}


@dataclass(frozen=True)
class Base:
    """The checkpoint that an adapter was trained on, as its qcli.json says. `fingerprint` is Source.fingerprint."""

    name: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class Pair:
    """The stored matrices of one module."""

    a: TensorInfo
    b: TensorInfo
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the module."""
        return self.b.shape[0], self.a.shape[1]


class Adapter:
    """A LoRA adapter whose config and headers are checked. `pairs` maps names of modules in transformers to their matrices.

    `base_model` and `revision` are what adapter_config.json calls its base; `base` is what qcli.json says of it, None without, and
    `recipe` that by which an unquantized base was quantized while it was read, None where it was not.
    """

    def __init__(self, place, label: str):
        self.place, self.label, self.name = place, label, place.name
        for name in (CONFIG, WEIGHTS):
            if name not in place.names:
                raise self._lacks(name)
        self.config = self.json(CONFIG)
        check_config(self.config, label)
        self.base_model, self.revision = self.config.get("base_model_name_or_path") or None, self.config.get("revision")
        self.base, self.recipe = self._base()
        self.pairs = self._pairs()

    def _lacks(self, name: str) -> CheckpointError:
        if name == CONFIG:
            return CheckpointError(f"{self.label} has no {CONFIG}", "Give the folder of a LoRA adapter as PEFT writes it.")
        old = " but adapter_model.bin, which may run code when it is read" if "adapter_model.bin" in self.place.names else ""
        return CheckpointError(f"{self.label} has no {WEIGHTS}{old}", "Save it with PEFT's save_pretrained().")

    def _base(self) -> tuple[Base | None, Recipe | None]:
        if "qcli.json" not in self.place.names:
            return None, None
        label = f"{self.label}/qcli.json"
        made = self.json("qcli.json")
        check(made, {"base": OBJECT, "quantized_as_read": OBJECT}, label)
        base, recipe = made.get("base"), made.get("quantized_as_read")
        if base is None:
            return None, None
        check(base, _OF_BASE, f"{label}: base")
        read = None if recipe is None else recipe_of(recipe, f"{label}: quantized_as_read")
        return Base(base["name"], base.get("revision"), base["fingerprint"]), read

    def _pairs(self) -> dict[str, Pair]:
        label, size = f"{self.label}/{WEIGHTS}", self.place.size(WEIGHTS)
        with open(self._file(), "rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                raise CheckpointError(f"{label} has another size than its place lists", DAMAGED)
            header = read_header_with(lambda offset, count: os.pread(file.fileno(), count, offset), WEIGHTS, size, label)
        halves: dict[str, dict[str, TensorInfo]] = {}
        for name, info in header.tensors.items():
            path, _, half = name.removeprefix(_PREFIX).rpartition(".lora_")
            if not name.startswith(_PREFIX) or half not in ("A.weight", "B.weight"):
                raise self._stray(name)
            halves.setdefault(path, {})[half[0]] = info
        if not halves:
            raise CheckpointError(f"{label} holds no tensors", "Train the adapter again, or fetch it again.")
        return {path: self._pair(path, found) for path, found in sorted(halves.items())}

    def _stray(self, name: str) -> CheckpointError:
        if name.startswith(_PREFIX) and name.endswith(".weight") and ".lora_" not in name:
            return CheckpointError(
                f"{self.label} holds {name}, a whole weight, expected the matrices of LoRA alone",
                "Where PEFT stored it beside an adapter of the output head and it was not trained, save the adapter again by "
                "save_pretrained(FOLDER, save_embedding_layers=False).",
            )
        what = next((what for end, what in _OTHERS.items() if name.endswith(end)), None)
        if what is None and not name.startswith(_PREFIX):
            what = f"a tensor whose name does not begin with {_PREFIX}"
        return refused(self.label, f"holds {name}, {what or 'which is no half of a LoRA pair'}")

    def _pair(self, module: str, halves: Mapping[str, TensorInfo]) -> Pair:
        label = f"{self.label}/{WEIGHTS}: {module}"
        if missing := {"A", "B"} - halves.keys():
            raise CheckpointError(f"{label} has no lora_{missing.pop()}.weight", "The file is not whole: fetch or train it again.")
        a, b = halves["A"], halves["B"]
        rank = self._by_pattern("rank_pattern", module, self.config["r"])
        for info, name, place in ((a, "A", 0), (b, "B", 1)):
            if len(info.shape) != 2 or info.shape[place] != rank or not info.numel:
                expected = f"[{rank}, in_features]" if name == "A" else f"[out_features, {rank}]"
                raise CheckpointError(
                    f"{label}.lora_{name}.weight has shape {list(info.shape)}, expected {expected} by the ranks in {CONFIG}",
                    "Fetch both files again, or load it with PEFT.",
                )
            if info.dtype not in dtypes.FLOATS:
                raise CheckpointError(f"{label}.lora_{name}.weight is {info.dtype}, expected a float dtype", WITH_PEFT)
        alpha = self._by_pattern("alpha_pattern", module, self.config["lora_alpha"])
        return Pair(a, b, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _by_pattern(self, field: str, module: str, otherwise: Any) -> Any:
        """The value of the first pattern that is the end of a module's name, as PEFT matches it."""
        for pattern, value in (self.config.get(field) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as e:
                raise CheckpointError(
                    f"{self.label}/{CONFIG}: {field} has {pattern!r}, which is no regular expression: {e}",
                    "Mend it, or fetch it again.",
                ) from None
        return otherwise

    def _file(self) -> Path:
        return self.place.local(WEIGHTS)

    @property
    def config_folder(self) -> Path:
        """Where adapter_config.json lies, and what was fetched beside it."""
        return self.place.local(CONFIG).parent

    @property
    def tokenizer_files(self) -> list[str]:
        """The files of the tokenizer and its chat template beside the adapter; none without a tokenizer."""
        return tokenizer_files(self.place.names)

    def json(self, name: str) -> dict:
        """The object in the JSON file `name`. Raises CheckpointError, HubError."""
        return read_object(self.place.local(name), f"{self.label}/{name}", "Mend it, or fetch it again.")

    @property
    def parameters(self) -> int:
        """How many weights the adapter has."""
        return sum(pair.a.numel + pair.b.numel for pair in self.pairs.values())

    @property
    def nbytes(self) -> int:
        """Their bytes as stored."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the matrices, and the fields of the config by which they count."""
        with open(self._file(), "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(repr(sorted((module, pair.scaling) for module, pair in self.pairs.items())).encode())
        return digest.hexdigest()

    def matrices(self, module: str):
        """(scaling B float32 [out_features, r], A float32 [r, in_features]) of a module. Raises NonFiniteError, CheckpointError."""
        import torch

        pair = self.pairs[module]
        read = []
        with open(self._file(), "rb") as file:
            for info in (pair.b, pair.a):
                data = torch.empty(info.nbytes, dtype=torch.uint8)
                read_into(file.fileno(), info.start, memoryview(data.numpy()))
                matrix = data.view(dtypes.torch_dtype(info.dtype)).view(info.shape).float()
                if not matrix.isfinite().all():
                    raise NonFiniteError(
                        f"{self.label}: {info.name} holds NaN or infinity", "Take an earlier state of its training."
                    )
                read.append(matrix)
        return read[0].mul_(pair.scaling), read[1]

    def check_fits(self, shapes: Mapping[str, tuple[int, int]], model: str) -> None:
        """Raises CheckpointError unless each adapted module is among `shapes`, the (out_features, in_features) of the linear
        modules of a model, with the adapter's own sizes. `model` names it."""
        lacking = [name for name in self.pairs if name not in shapes]
        wrong = [
            f"{name} ({list(pair.shape)}, the model has {list(shapes[name])})"
            for name, pair in self.pairs.items()
            if name in shapes and pair.shape != shapes[name]
        ]
        kinds = (("modules that are no linear modules of the model", lacking), ("modules of another shape", wrong))
        parts = [together(what, names) for what, names in kinds if names]
        if parts:
            base = f", {self.base_model}" if self.base_model else ""
            message = f"{self.label} does not fit {model}: {'; '.join(parts)}"
            raise CheckpointError(message, f"Give the base that it was trained on{base}.")

    def check_names(self, layout: Layout, model: str) -> None:
        """`check_fits` as far as the layout of a model can tell, before any weight is read."""
        known = {name: self.pairs[name].shape for name in layout.candidates if name in self.pairs}
        known |= {linear.module: (linear.out_features, linear.in_features) for linear in layout.linears.values()}
        self.check_fits(known, model)

    def other_base(self, source: Source) -> str | None:
        """A sentence, where qcli.json says that the adapter was trained on another checkpoint than `source`."""
        if self.base is None or self.base.fingerprint == source.fingerprint:
            return None
        return (
            f"{self.label} was trained on {self.base.name} ({self.base.fingerprint[:12]}), and {source.label} is another "
            f"checkpoint ({source.fingerprint[:12]})"
        )

    def warn_of_other_base(self, source: Source, recipe: Recipe | None) -> None:
        """Warns (QcliWarning) of what `other_base` finds, or where `source`, which is read by `recipe`, was read by another one."""
        if (other := self.other_base(source)) is not None:
            warnings.warn(other, QcliWarning, stacklevel=3)
        elif self.base is not None and recipe != self.recipe:
            before, now = (f"quantized to {each.default.method}" if each else "as it is stored" for each in (self.recipe, recipe))
            options = " by other options" if before == now else ""
            warnings.warn(
                f"{self.label} was trained on {source.label} {before}, and it is read {now}{options}: "
                "quantize it alike, or merge the two",
                QcliWarning,
                stacklevel=3,
            )


def open_adapter(adapter: str, revision: str | None = None) -> Adapter:
    """The LoRA adapter in the folder `adapter`, or in the hub repository of that id. Reads its config and headers.

    Raises UsageError, HubError, and CheckpointError for what is no LoRA adapter, is damaged, or holds more than qcli computes.
    """
    if Path(adapter).is_file():
        raise UsageError(f"{adapter} is a file, expected an adapter's folder", f"Give the folder that holds {CONFIG}.")
    return Adapter(open_place(adapter, revision), adapter)
