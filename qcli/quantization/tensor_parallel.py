"""Whether a quantized model can be divided over several GPUs, as vLLM and other servers divide it (Megatron-LM, arXiv:1909.08053).

Projections into attention and into the feed-forward layer are cut by output rows, those out of them by input columns. A cut must
not part a group of scales, nor a word of packed codes. Servers find that out when they load; the plan tells it before.
"""

from collections.abc import Iterable, Iterator

from qcli.checkpoint.layout import Linear
from qcli.errors import together
from qcli.schemes import Scheme

_BY_COLUMNS = ("o_proj", "down_proj", "out_proj", "c_proj", "dense_4h_to_h", "fc2", "w2", "wo", "attention.dense")
_REPLICATED = ("k_proj", "v_proj")  # where there are fewer key and value heads than GPUs


def problems(degree: int, modules: Iterable[tuple[Linear, Scheme]], rows_together: int) -> Iterator[str]:
    """What stands against dividing these modules over `degree` GPUs. `rows_together` is the format's."""
    found: dict[str, list[str]] = {}
    for linear, scheme in modules:
        if reason := _reason(degree, linear, scheme, rows_together):
            found.setdefault(reason, []).append(linear.module)
    for reason, names in found.items():
        yield together(f"modules that {degree} GPUs cannot share: {reason}", names)


def _reason(degree: int, linear: Linear, scheme: Scheme, rows_together: int) -> str | None:
    if linear.module.endswith(_BY_COLUMNS):
        columns, group = linear.in_features, scheme.size or 1
        if columns % degree:
            return f"{columns} columns"
        part = columns // degree
        return f"parts of {part} columns, which groups of {group} do not divide" if part % group else None
    if linear.module.endswith(_REPLICATED) and linear.out_features % degree:
        return None
    rows, together_ = linear.out_features, scheme.size if scheme.share == "block" else rows_together
    if rows % degree:
        return f"{rows} rows"
    part = rows // degree
    return f"parts of {part} rows, no multiple of {together_}" if part % together_ else None
