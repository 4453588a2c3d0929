"""The plan of a quantization: what is read, what is written and where, decided from headers before any weight is read.

A plan is data. Every problem that headers can show is in `Plan.problems`, together; a plan with none can be executed.
"""

import fnmatch
import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from qcli import __version__
from qcli.checkpoint import config_json, dtypes
from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.modules import Layout, Linear
from qcli.checkpoint.safetensors_file import TensorInfo, build_header
from qcli.errors import PlanError, together

# Fused projections of vLLM, which looks a skip list up by its own names.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
CHUNK_BYTES = 1 << 20  # of source data at a time: what bounds the memory of a run
_CHUNKS_IN_WORK = 128  # measured: float32 copies of a chunk, and what the allocator keeps of those that were freed


@dataclass(frozen=True)
class Output:
    """A tensor of the output: its place is bytes `start` to `end` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True)
class Unit:
    """One source tensor and everything that is made of it. `linear` is None for what is carried over."""

    index: int
    info: TensorInfo
    file: str
    linear: Linear | None
    outputs: tuple[Output, ...]

    @property
    def output_bytes(self) -> int:
        return sum(o.end - o.start for o in self.outputs)


@dataclass(frozen=True)
class Shard:
    """A file of the output: `header` is its first bytes, `size` its length."""

    name: str
    header: bytes
    size: int


@dataclass
class Plan:
    """See the module. Sizes are bytes."""

    source: object
    method: object
    layout: Layout
    output: Path
    dtype: str  # safetensors code of the model's dtype in the output
    compute_dtype: str  # torch name
    skip_modules: list[str] | None
    units: list[Unit] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    allow_nonfinite: bool = False
    disk_bytes: int = 0  # that the run needs beyond what is there already

    def check(self) -> None:
        """Raises PlanError if anything stands against this plan."""
        if self.problems:
            raise PlanError(self.source.label, self.problems)

    @cached_property
    def source_bytes(self) -> int:
        return sum(u.info.nbytes for u in self.units)

    @cached_property
    def output_bytes(self) -> int:
        return sum(s.size for s in self.shards)

    @cached_property
    def parameters(self) -> int:
        return sum(u.info.numel for u in self.units)

    @cached_property
    def quantized(self) -> list[Unit]:
        return [u for u in self.units if u.linear]

    @property
    def bits_per_weight(self) -> float:
        """Bits that the output spends on each parameter, everything counted."""
        return 8 * sum(u.output_bytes for u in self.units) / max(self.parameters, 1)

    @property
    def quantized_bits_per_weight(self) -> float:
        """Bits per parameter of the quantized modules alone."""
        count = sum(u.info.numel for u in self.quantized)
        return 8 * sum(u.output_bytes for u in self.quantized) / max(count, 1)

    @property
    def working_memory(self) -> int:
        """Bytes that the run needs beyond the interpreter and its libraries, an upper estimate: chunks in work, and the
        largest tensor's absmax values, which are kept until its last row."""
        sizes = (self.method.working_bytes(u.linear.out_features, u.linear.in_features) for u in self.quantized)
        chunk = min(CHUNK_BYTES, max((u.info.nbytes for u in self.units), default=0))
        return max(sizes, default=0) + _CHUNKS_IN_WORK * chunk

    @cached_property
    def config(self) -> dict[str, object]:
        """config.json of the output."""
        config = json.loads(json.dumps(self.source.config))
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
        config["quantization_config"] = self.method.quantization_config(self.skip_modules, self.compute_dtype)
        return config

    @cached_property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to go on where an earlier one stopped."""
        headers = hashlib.sha256()
        for shard in self.shards:
            headers.update(shard.name.encode() + shard.header)
        return {
            "qcli": __version__,
            "source": self.source.fingerprint,
            "method": self.method.name,
            "options": asdict(self.method),
            "dtype": dtypes.TORCH_NAMES[self.dtype],
            "compute_dtype": self.compute_dtype,
            "skip_modules": self.skip_modules,
            "output headers": headers.hexdigest(),
        }

    @cached_property
    def index(self) -> bytes | None:
        """model.safetensors.index.json, or None for a single file."""
        if len(self.shards) == 1:
            return None
        outputs = [o for u in self.units for o in u.outputs]
        total = sum(o.end - o.start for o in outputs)
        index = {
            "metadata": {"total_parameters": self.parameters, "total_size": total},
            "weight_map": {o.name: o.file for o in sorted(outputs, key=lambda o: o.name)},
        }
        return (json.dumps(index, indent=2) + "\n").encode()


def make_units(source, layout: Layout, method, dtype: str, quantized: set[str], problems: list[str]) -> list:
    """(source file, TensorInfo, Linear or None, output specs) of every tensor, in the order of the source's files."""
    rows = []
    misshaped, of_no_use = [], {}
    order = {file: i for i, file in enumerate(source.files)}
    tensors = sorted(source.tensors.values(), key=lambda place: (order[place[0]], place[1].start))
    for file, info in tensors:
        linear = layout.linears.get(info.name) if info.name in quantized else None
        if linear:
            expected = (linear.out_features, linear.in_features)
            expected = expected[::-1] if linear.transposed else expected
            if info.shape != expected:
                misshaped.append(f"{info.name} ({list(info.shape)}, the model expects {list(expected)})")
                continue
            if info.dtype not in dtypes.FLOATS:
                of_no_use.setdefault(info.dtype, []).append(info.name)
                continue
            specs = method.outputs(info.name, linear.out_features, linear.in_features, quantized_dtype(info, method, dtype))
        else:
            if info.name in layout.misshaped:
                stored, expected = layout.misshaped[info.name]
                misshaped.append(f"{info.name} ({list(stored)}, the model expects {list(expected)})")
                continue
            target = info.dtype
            if info.dtype in dtypes.FLOATS:
                target = "F32" if layout.stays_fp32(info.name, dtype) else dtype
            specs = [TensorSpec(info.name, target, info.shape)]
        rows.append((file, info, linear, specs))
    if misshaped:
        problems.append(together("tensors whose shape is not the model's", misshaped))
    for code, names in of_no_use.items():
        floats = ", ".join(dtypes.FLOATS)
        problems.append(together(f"weights to quantize that are stored as {code}, expected one of {floats}", names))
    return rows


def quantized_dtype(info: TensorInfo, method, dtype: str) -> str:
    """The dtype in which a weight enters its method: the model's, or what is stored where that loses nothing."""
    if method.casts_to_model_dtype:
        return dtype
    if info.dtype in dtypes.FLOAT8:
        return "BF16"
    return "F32" if info.dtype == "F64" else info.dtype


def lay_out(rows: list, max_shard_size: int) -> tuple[list[Unit], list[Shard]]:
    """Places every output. A weight and its companions share a shard; within a shard wider elements come first, so that
    every tensor is aligned to its element."""
    groups, size = [[]], 0
    for row in rows:
        nbytes = sum(spec.nbytes for spec in row[3])
        if groups[-1] and size + nbytes > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(row)
        size += nbytes
    units, shards = [], []
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if len(groups) > 1 else "model.safetensors"
        specs = [spec for row in group for spec in row[3]]
        specs.sort(key=lambda spec: -dtypes.ITEMSIZE.get(spec.dtype, 1))  # stable: source order within a width
        header, starts = build_header([(s.name, s.dtype, s.shape) for s in specs], {"format": "pt"})
        for file, info, linear, row_specs in group:
            outputs = tuple(
                Output(s.name, s.dtype, tuple(s.shape), name, starts[s.name], starts[s.name] + s.nbytes) for s in row_specs
            )
            units.append(Unit(len(units), info, file, linear, outputs))
        shards.append(Shard(name, header, len(header) + sum(s.nbytes for s in specs)))
    return units, shards


def choose_modules(layout: Layout, patterns: list[str], problems: list[str], notes: list[str]) -> set[str]:
    """Names of the weight tensors to quantize: every linear but what transformers leaves alone and what `patterns` match.

    A pattern is a glob over full module names (or over a parent's full name). One that matches nothing is a problem.
    """
    linears = layout.linears.values()
    skipped = set()
    for pattern in patterns:
        hits = {x.module for x in linears if _matches(x.module, pattern)}
        skipped |= hits
        others = layout.default_skip + layout.always_skip
        if not hits and not any(_matches(module, pattern) for module in others):
            ends = sorted({x.module.rsplit(".", 1)[-1] for x in linears})
            near = f"*.{pattern}" if pattern in ends else f"*.{ends[0]}" if ends else "*"
            problems.append(f"--skip {pattern!r} matches no module; a full name or a glob such as {near!r} is expected")
    chosen = [x for x in linears if x.module not in skipped and not layout.skipped(x.module, None)]
    for fused, parts in FUSED.items():
        for parent in sorted({m.rpartition(".")[0] for m in skipped if m.rpartition(".")[2] in parts}):
            left = [x.module for x in chosen if x.module in {f"{parent}.{part}" for part in parts}]
            if left:
                notes.append(
                    f"{parent}: {', '.join(m.rpartition('.')[2] for m in left)} quantized beside skipped members of {fused}:"
                    " vLLM, which fuses them, will not load this"
                )
    return {x.tensor for x in chosen}


def _matches(module: str, pattern: str) -> bool:
    parts = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def skip_list(layout: Layout, quantized: set[str], problems: list[str]) -> list[str] | None:
    """`llm_int8_skip_modules`: None where transformers' own default says the same, else full dotted names.

    Every name that is not quantized is listed, by its name in transformers and in the checkpoint (transformers 4 may know
    the latter), and by the fused name that vLLM looks up.
    """
    chosen = {layout.linears[name].module for name in quantized}
    others = [m for m in layout.candidates if m not in chosen]
    if not layout.explicit_skip and all(layout.skipped(m, None) for m in others):
        return None
    names = set(others) | set(layout.default_skip)
    names |= {x.tensor.removesuffix(".weight") for x in layout.linears.values() if x.module in names}
    for fused, parts in FUSED.items():
        for parent in {m.rpartition(".")[0] for m in others}:
            if all(f"{parent}.{part}" in others for part in parts):
                names.add(f"{parent}.{fused}")
    listed = sorted(names)
    for module in layout.candidates:
        if layout.skipped(module, listed) != (module not in chosen):
            problems.append(f"{module}: no skip list makes transformers leave exactly this selection alone; skip its parent")
    return listed
