"""From a recipe to outputs: which modules are quantized, what is stored of every tensor, and where in which file it lies."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from qcli.checkpoint import dtypes
from qcli.checkpoint.dtypes import TensorSpec
from qcli.checkpoint.layout import Layout, Linear
from qcli.checkpoint.safetensors_file import TensorInfo, build_header
from qcli.checkpoint.source import Source
from qcli.errors import together
from qcli.formats import Format, Weight
from qcli.methods import entering_dtype
from qcli.methods._method import Method
from qcli.methods.choosing import made
from qcli.quantization.plan import Output, Shard, Work
from qcli.recipe import Recipe, matches


@dataclass(frozen=True, slots=True)
class Planned:
    """A source tensor and what will be stored of it, not yet anywhere. `linear` and `method` as in Work."""

    info: TensorInfo
    linear: Linear | None
    method: Method | None
    specs: tuple[TensorSpec, ...]


def choose(layout: Layout, recipe: Recipe, problems: list[str]) -> dict[str, Method]:
    """The method of every weight tensor that `recipe` quantizes, by the tensor's name: linear modules but for what transformers
    leaves alone, and the head where the recipe names it. A glob that matches nothing is a problem."""
    others = layout.default_skip + layout.always_skip
    modules = [linear.module for linear in layout.linears.values()]
    for glob in recipe.unmatched([*modules, *others]):
        ends = sorted({module.rsplit(".", 1)[-1] for module in modules})
        near = f"*.{glob}" if glob in ends else f"*.{ends[0]}" if ends else "*"
        problems.append(f"{glob!r} matches no module; a full name or a glob such as {near!r} is expected")
    chosen, known = {}, {}
    for linear in layout.linears.values():
        choice = recipe.choice(linear.module)
        if not choice.keeps and not layout.skipped(linear.module, None):
            if choice not in known:
                known[choice] = made(choice)
            chosen[linear.tensor] = known[choice]
    problems += _about_head(layout, recipe)
    if recipe.head is not None:
        if layout.head is None:
            problems.append(f"no output head can be quantized: {layout.no_head}; leave out --head, or the recipe's head")
        else:
            chosen[layout.head.linear.tensor] = known.get(recipe.head) or made(recipe.head)
    return chosen


def _about_head(layout: Layout, recipe: Recipe) -> list[str]:
    """What the rules of `recipe` say of the output head alone, which only the recipe's `head` decides."""
    if layout.head is None:
        return []
    of_head = {layout.head.module, layout.head.linear.module}
    found = []
    for glob, choice in recipe.rules:
        others = any(matches(linear.module, glob) for linear in layout.linears.values() if linear.module not in of_head)
        if others or not any(matches(module, glob) for module in of_head):
            continue
        if choice.keeps and recipe.head is not None:
            found.append(f"{glob!r} is to stay as it is, and the head is to be quantized; leave out --skip or --head")
        elif not choice.keeps:
            found.append(f"{glob!r} is the output head, which no rule decides; give the recipe a head, or pass --head")
    return found


def plan_tensors(
    source: Source, layout: Layout, chosen: dict[str, Method], format: Format, dtype: str, problems: list[str]
) -> list[Planned]:
    """What is stored of every tensor, in the order of the source's files. `dtype` is the code of what is not quantized."""
    found: list[Planned] = []
    misshaped: list[str] = []
    of_no_use: dict[str, list[str]] = {}
    refused: dict[str, list[str]] = {}
    order = {file: i for i, file in enumerate(source.files)}
    tensors = sorted(source.tensors.values(), key=lambda info: (order[info.file], info.start))
    for info in tensors:
        method = chosen.get(info.name)
        linear = layout.linear(info.name) if method else None
        if linear and method:
            expected = (linear.out_features, linear.in_features)
            expected = expected[::-1] if linear.transposed else expected
            if info.shape != expected:
                misshaped.append(f"{info.name} ({list(info.shape)}, the model expects {list(expected)})")
                continue
            if info.dtype not in dtypes.FLOATS:
                of_no_use.setdefault(info.dtype, []).append(info.name)
                continue
            weight = weight_of(info, linear, method, dtype)
            reason = format.refuses_shape(method.scheme, weight.out_features, weight.in_features)
            if reason:
                refused.setdefault(reason, []).append(linear.module)
                continue
            specs = format.tensors(weight, method.scheme)
        else:
            if info.name in layout.misshaped:
                stored, expected = layout.misshaped[info.name]
                misshaped.append(f"{info.name} ({list(stored)}, the model expects {list(expected)})")
                continue
            target = info.dtype
            if info.dtype in dtypes.FLOATS:
                target = "F32" if layout.stays_fp32(info.name, dtype) else dtype
            specs = [TensorSpec(info.name, target, tuple(info.shape))]
        found.append(Planned(info, linear, method, tuple(specs)))
    if misshaped:
        problems.append(together("tensors whose shape is not the model's", misshaped))
    for code, names in of_no_use.items():
        floats = ", ".join(dtypes.FLOATS)
        problems.append(together(f"weights to quantize that are stored as {code}, expected one of {floats}", names))
    for reason, modules in refused.items():
        problems.append(together(f"modules: {reason}", modules))
    return found


def weight_of(info: TensorInfo, linear: Linear, method: Method, dtype: str) -> Weight:
    """A source tensor as its format is asked about it. `dtype` is the code of the model's dtype."""
    return Weight(info.name, linear.out_features, linear.in_features, entering_dtype(method, info.dtype, dtype))


def evenly(sizes: Sequence[int], most: int) -> list[int]:
    """Where groups of neighbours begin, but for the first. An element above `most` is alone. The others are in as few groups of up
    to `most` as can be, and these are as equal as they can be: the largest is as small as possible."""
    ends = [0, *accumulate(sizes)]
    low, high = max((size for size in sizes if size <= most), default=0), most
    fewest = len(_filled(ends, most))
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(ends, middle)) <= fewest else (middle + 1, high)
    return _filled(ends, high)


def _filled(ends: Sequence[int], most: int) -> list[int]:
    """Where groups begin, but for the first, if each takes what it can. `ends` are sums of sizes, from 0 on."""
    starts: list[int] = []
    first = 0
    while True:
        first = max(bisect_right(ends, ends[first] + most) - 1, first + 1)
        if first >= len(ends) - 1:
            return starts
        starts.append(first)


def place_outputs(planned: list[Planned], max_shard_size: int, format: Format) -> tuple[list[Work], list[Shard]]:
    """Places every output. A weight and its companions share a shard, but for what `format` keeps in a file apart. Within a shard
    wider elements come first, so that every tensor is aligned to its element."""
    apart: dict[str, list[TensorSpec]] = {}
    together: list[list[TensorSpec]] = []
    for each in planned:
        beside = {spec: file for spec in each.specs if (file := format.file_apart(spec.name))}
        for spec, file in beside.items():
            apart.setdefault(file, []).append(spec)
        together.append([spec for spec in each.specs if spec not in beside])
    sizes = [sum(spec.nbytes for spec in specs) for specs in together]
    groups: list[list[TensorSpec]] = [[]]
    beginnings = set(evenly(sizes, max_shard_size))
    for number, specs in enumerate(together):
        if number in beginnings:
            groups.append([])
        groups[-1] += specs
    # A file named model.safetensors would be preferred to an index, and an index has to leave out what lies apart.
    several = len(groups) > 1 or apart
    names = [
        f"model-{n:05d}-of-{len(groups):05d}.safetensors" if several else "model.safetensors" for n in range(1, len(groups) + 1)
    ]
    shards = []
    placed: dict[str, Output] = {}
    for name, specs in (*zip(names, groups), *apart.items()):
        specs.sort(key=lambda spec: -dtypes.ITEMSIZE.get(spec.dtype, 1))  # stable: source order within a width
        header, starts = build_header([(s.name, s.dtype, s.shape) for s in specs], {"format": "pt"})
        placed |= {s.name: Output(s.name, s.dtype, s.shape, name, starts[s.name], starts[s.name] + s.nbytes) for s in specs}
        shards.append(Shard(name, header, len(header) + sum(s.nbytes for s in specs)))
    work = [Work(i, p.info, p.linear, p.method, tuple(placed[spec.name] for spec in p.specs)) for i, p in enumerate(planned)]
    return work, shards
