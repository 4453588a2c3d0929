"""Which modules are left alone, in the words that loaders look them up by, and what loaders fuse."""

from collections.abc import Iterator

from qcli.formats import Choice

# Fused projections of vLLM, which looks a skip list up by its own names.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def skip_list(choice: Choice) -> list[str] | None:
    """`llm_int8_skip_modules`: None where transformers' own default says the same, else full dotted names.

    Every module that is not quantized is listed by its name in transformers and in the checkpoint (transformers 4 may know the
    latter), and by the fused name that vLLM looks up.
    """
    layout = choice.layout
    others = [m for m in layout.candidates if m not in choice.schemes]
    if not layout.explicit_skip and all(layout.skipped(m, None) for m in others):
        return None
    names = set(others) | set(layout.default_skip)
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
