"""The plan of a quantization: what is read, what is written and where, decided from headers before any weight is read.

A plan is data: it goes to JSON and back. Every problem that headers can show is in `Plan.problems`, together. A plan without any
can be executed.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qcli import __version__, formats, methods
from qcli.calibration.settings import Calibration
from qcli.checkpoint import config_json, dtypes
from qcli.checkpoint.layout import Linear
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.source import Source
from qcli.checkpoint.weight_files import OUTLIERS
from qcli.errors import PlanError
from qcli.formats import Format
from qcli.methods._method import Method
from qcli.methods.choosing import as_asked, methods_of, needs_of
from qcli.recipe import Recipe, without_folders
from qcli.schemes import CHUNK_BYTES, CHUNKS_IN_WORK


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the output: its place is bytes `start` to `end` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Work:
    """One source tensor and everything that is made of it. `linear` and `method` are None for what is carried over. `columns` are
    those that a report keeps in 16 bits."""

    index: int
    info: TensorInfo
    linear: Linear | None
    method: Method | None
    outputs: tuple[Output, ...]
    columns: tuple[int, ...] = ()

    @property
    def module(self) -> str:
        """The linear module whose weight it is."""
        assert self.linear is not None
        return self.linear.module

    @property
    def output_bytes(self) -> int:
        return sum(o.end - o.start for o in self.outputs)

    @property
    def becomes(self) -> str:
        """The name of the scheme, or the dtype, in which the tensor is stored."""
        if self.method is not None:
            return self.method.scheme.name
        code = self.outputs[0].dtype
        return dtypes.TORCH_NAMES.get(code, code)


@dataclass(frozen=True)
class Shard:
    """A file of the output: `header` is its first bytes, `size` its length."""

    name: str
    header: bytes
    size: int


@dataclass
class Plan:
    """See the module. Sizes are bytes."""

    source: Source
    recipe: Recipe
    format: Format
    decided_by: str  # what said which modules are linear
    output: Path
    dtype: str  # safetensors code of the model's dtype in the output
    compute_dtype: str  # torch name
    quantization_config: dict[str, Any]
    work: list[Work] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    calibration: Calibration | None = None  # the texts that the methods of some modules need
    allow_nonfinite: bool = False
    disk_bytes: int = 0  # that the run needs beyond what is there already
    uploads: bool = False  # whether the machines of a cluster upload the weights that they write, and keep none

    def check(self) -> None:
        """Raises PlanError if anything stands against this plan."""
        if self.problems:
            raise PlanError(self.source.label, self.problems)

    @cached_property
    def method(self) -> Method:
        """The method of the recipe's default, or where that keeps modules as they are, of its first rule that does not."""
        return methods_of(self.recipe)[0]

    @property
    def options(self) -> dict[str, object]:
        """The options of `method` as the files of the output state them."""
        return without_folders(methods.options_of(self.method))

    @property
    def method_name(self) -> str:
        """The names of the schemes, as docs/methods.md has them, the most frequent first."""
        return ", ".join(name for name, _ in self.schemes.most_common())

    @cached_property
    def schemes(self) -> Counter[str]:
        """How many modules each scheme has, by its name."""
        return Counter(w.method.scheme.name for w in self.quantized if w.method)

    @cached_property
    def source_bytes(self) -> int:
        return sum(w.info.nbytes for w in self.work)

    @cached_property
    def output_bytes(self) -> int:
        return sum(s.size for s in self.shards)

    @cached_property
    def parameters(self) -> int:
        return sum(w.info.numel for w in self.work)

    @cached_property
    def quantized(self) -> list[Work]:
        return [w for w in self.work if w.linear]

    @cached_property
    def calibrated(self) -> list[Work]:
        """The work on weights whose methods need statistics of texts."""
        return [w for w in self.quantized if w.method and needs_of(w.method) != "nothing"]

    @property
    def bits_per_weight(self) -> float:
        """Bits that the output spends on each parameter, everything counted."""
        return 8 * sum(w.output_bytes for w in self.work) / max(self.parameters, 1)

    @property
    def quantized_bits_per_weight(self) -> float:
        """Bits per parameter of the quantized modules alone."""
        count = sum(w.info.numel for w in self.quantized)
        return 8 * sum(w.output_bytes for w in self.quantized) / max(count, 1)

    @property
    def working_memory(self) -> int:
        """Bytes that the run needs beyond the interpreter and its libraries, an upper estimate: chunks in work, and what the
        largest tensor's encoder holds until its last row."""
        held = (w.method.scheme.held_bytes(w.linear.out_features, w.linear.in_features) for w in self.work if w.method and w.linear)
        chunk = min(CHUNK_BYTES, max((w.info.nbytes for w in self.work), default=0))
        return max(held, default=0) + CHUNKS_IN_WORK * chunk

    @cached_property
    def config(self) -> dict[str, object]:
        """config.json of the output."""
        config: dict[str, Any] = json.loads(json.dumps(self.source.config))
        name = dtypes.TORCH_NAMES[self.dtype]
        for _, part in config_json.parts(config):
            for key in ("dtype", "torch_dtype"):
                if part.get(key) is not None:
                    part[key] = name
        for _, part in config_json.parts(config):
            if "auto_map" in part:
                kept = config_json.live_auto_map(part["auto_map"], self.source.carried.files)
                part["auto_map"] = kept
                if kept is None:
                    del part["auto_map"]
        if not config.get("dtype") and not config.get("torch_dtype"):
            config["dtype"] = name
        config["quantization_config"] = self.quantization_config
        return config

    @cached_property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to go on where an earlier one stopped."""
        headers = hashlib.sha256()
        for shard in self.shards:
            headers.update(shard.name.encode() + shard.header)
        found: dict[str, object] = {
            "qcli": __version__,
            "source": self.source.fingerprint,
            "method": self.method.scheme.method,
            "options": self.options,
            **({"head": self.recipe.head.without_folders().summary()} if self.recipe.head else {}),
            "dtype": dtypes.TORCH_NAMES[self.dtype],
            "compute_dtype": self.compute_dtype,
            "skip_modules": self.skip_modules,
            "output headers": headers.hexdigest(),
        }
        if self.is_mixed:
            found["recipe"] = self.recipe.without_folders().summary()
        if reported := {w.info.name: w.columns for w in self.quantized if w.columns}:
            found["outlier_columns"] = hashlib.sha256(json.dumps(reported).encode()).hexdigest()
        if self.format.name != formats.NAMES[0]:
            found["format"] = self.format.name
        if self.calibration:
            found["calibration"] = self.calibration.identity
        return found

    @property
    def skip_modules(self) -> list[str] | None:
        """The modules that the config lists as not quantized."""
        return self.format.skipped(self.quantization_config)

    @property
    def is_mixed(self) -> bool:
        """Whether not all quantized modules have the same method with the same options. How many columns a report names is none."""
        return len({w.method and as_asked(w.method) for w in self.quantized}) > 1

    @cached_property
    def index(self) -> bytes | None:
        """model.safetensors.index.json, or None for a single file. Of a file apart only its metadata speaks."""
        if len(self.shards) == 1:
            return None
        outputs = [o for w in self.work for o in w.outputs if o.file != OUTLIERS]
        total = sum(o.end - o.start for o in outputs)
        apart = {"outlier_columns": OUTLIERS} if any(s.name == OUTLIERS for s in self.shards) else {}
        index = {
            "metadata": {"total_parameters": self.parameters, "total_size": total, **apart},
            "weight_map": {o.name: o.file for o in sorted(outputs, key=lambda o: o.name)},
        }
        return (json.dumps(index, indent=2) + "\n").encode()
