"""Which modules are left alone, in the words that loaders look them up by, what loaders fuse, and what some fail on."""

from collections.abc import Iterator

from qcli.formats import Choice
from qcli.schemes import BLOCK_SIZES, Scheme

# Fused projections of vLLM, which looks a skip list up by its own names.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fused_parts(module: str) -> list[str]:
    """The modules that vLLM makes one with `module`, itself among them; itself alone where it fuses none."""
    parent, _, last = module.rpartition(".")
    return next(([f"{parent}.{part}" for part in parts] for parts in _FUSED.values() if last in parts), [module])


def skip_list(choice: Choice) -> list[str] | None:
    """`llm_int8_skip_modules`: None where transformers' own default says the same, else full dotted names.

    Every module that is not quantized is listed by its name in transformers and in the checkpoint (transformers 4 may know the
    latter), and by the fused name that vLLM looks up.
    """
    layout = choice.layout
    others = [m for m in layout.candidates if m not in choice.schemes]
    as_by_default = all(layout.skipped(m, None) == (m not in choice.schemes) for m in layout.candidates)
    if not layout.explicit_skip and as_by_default:
        return None
    names = (set(others) | set(layout.default_skip)) - set(choice.schemes)
    names |= {x.tensor.removesuffix(".weight") for x in layout.linears.values() if x.module in names}
    for fused, parts in _FUSED.items():
        for parent in {m.rpartition(".")[0] for m in others}:
            if all(f"{parent}.{part}" in others for part in parts):
                names.add(f"{parent}.{fused}")
    listed = sorted(names)
    for module in layout.candidates:
        if layout.skipped(module, listed) != (module not in choice.schemes):
            choice.problems.append(f"{module}: no skip list makes transformers leave exactly this selection alone; skip its parent")
    return listed


def fused_notes(choice: Choice) -> Iterator[str]:
    """vLLM fuses some projections, and wants all members quantized or none."""
    skipped = [m for m in choice.layout.candidates if m not in choice.schemes and not choice.layout.skipped(m, None)]
    for fused, parts in _FUSED.items():
        for parent in sorted({m.rpartition(".")[0] for m in skipped if m.rpartition(".")[2] in parts}):
            left = [m for m in choice.schemes if m in {f"{parent}.{part}" for part in parts}]
            if left:
                yield (
                    f"{parent}: {', '.join(m.rpartition('.')[2] for m in left)} quantized beside skipped members of {fused}:"
                    " vLLM, which fuses them, will not load this"
                )


def conv1d_problems(choice: Choice, label: str) -> list[str]:
    """The problem of a format, `label`, whose readers know no Conv1D; at most one."""
    linears = choice.layout.linears.values()
    module = next((linear.module for linear in linears if linear.transposed and linear.module in choice.schemes), None)
    return [f"{module} is a Conv1D, and readers of {label} take nn.Linear alone"] if module else []


def ragged_groups(scheme: Scheme, in_features: int) -> str | None:
    """Why groups do not divide rows, as a sentence without its end; None where they do."""
    if scheme.share != "group" or in_features % scheme.size == 0:
        return None
    fitting = [size for size in (128, 64, 32) if in_features % size == 0]
    advice = f"; a group size of {fitting[0]} does" if fitting and scheme.codebook is None else ""
    return f"groups of {scheme.size} do not divide rows of {in_features}{advice}"


def straddling_notes(choice: Choice) -> Iterator[str]:
    """The format allows blocks that cross a row. Some readers fail on them."""
    shapes = {x.module: x for x in choice.layout.linears.values() if x.module in choice.schemes}
    sizes = {m: scheme.size for m, scheme in choice.schemes.items() if scheme.share == "flat"}
    wide = [shapes[m] for m, size in sizes.items() if shapes[m].in_features % size]
    if not wide:
        return
    block_size = max(sizes.values())
    every = [shapes[m] for m in sizes]
    fitting = [size for size in BLOCK_SIZES if size < block_size and not any(x.in_features % size for x in every)]
    advice = f"; --block-size {max(fitting)} divides them all" if fitting else ""
    example = min(wide, key=lambda x: x.module)
    yield (
        f"{len(wide)} modules have rows that blocks of {block_size} do not divide (such as {example.module}, "
        f"{example.in_features} wide): qcli runs them, but bitsandbytes on a CPU with AVX-512 fails or decodes them wrongly{advice}"
    )
