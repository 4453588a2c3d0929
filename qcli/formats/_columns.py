"""What GPTQ's and AWQ's formats share: the weight is stored transposed, [in_features, out_features], in `qweight`, `qzeros` and
`scales`, and all quantized modules have the same bits and the same groups."""

from collections.abc import Mapping, Sequence

from qcli.checkpoint.dtypes import CODES, MODEL_DTYPES
from qcli.formats import Choice
from qcli.schemes import WHOLE_ROW, Scheme

FLOATS = tuple(CODES[name] for name in MODEL_DTYPES)
COMPANIONS = ("qzeros", "scales", "g_idx")
LOAD_ELSEWHERE = "Load it with transformers and the library that wrote it."


def weight_name(tensor: str) -> str:
    """The weight that a stored tensor stands for, if it holds the codes of one; else itself."""
    return f"{tensor.removesuffix('qweight')}weight" if tensor.endswith(".qweight") else tensor


def companions(tensors: Mapping[str, object]) -> dict[str, str]:
    """Stored tensor beside `qweight` to it."""
    owners = {}
    for name in tensors:
        module, _, last = name.rpartition(".")
        if last in COMPANIONS and f"{module}.qweight" in tensors:
            owners[name] = f"{module}.qweight"
    return owners


def one_scheme(choice: Choice, label: str) -> Scheme | None:
    """The one scheme of all modules. Others, and modules that readers do not know, become problems."""
    schemes = list(dict.fromkeys(choice.schemes.values()))
    if len(schemes) > 1:
        choice.problems.append(f"{label} has one number of bits and one group size for all modules, and the recipe has several")
    for linear in choice.layout.linears.values():
        if linear.transposed and linear.module in choice.schemes:
            choice.problems.append(f"{linear.module} is a Conv1D, and readers of {label} take nn.Linear alone")
            break
    return schemes[0] if schemes else None


def mixture_reason(name: str, schemes: Sequence[Scheme]) -> str | None:
    """Why several schemes in one model are refused."""
    return f"{name}'s format has one number of bits and one group size for all modules" if len(set(schemes)) > 1 else None


def left_alone(choice: Choice) -> list[str]:
    """The linear modules that are not quantized, by full name."""
    return sorted({*choice.layout.candidates} - set(choice.schemes))


def group_size(scheme: Scheme) -> int:
    """As configs have it."""
    return scheme.size if scheme.share == "group" else WHOLE_ROW


def divisibility(scheme: Scheme, in_features: int, out_features: int, rows: int) -> str | None:
    """Why groups or words do not divide a weight, as a sentence without its end."""
    if scheme.share == "group" and in_features % scheme.size:
        fitting = [size for size in (128, 64, 32) if in_features % size == 0]
        return f"groups of {scheme.size} do not divide rows of {in_features}" + (
            f"; a group size of {fitting[0]} does" if fitting else ""
        )
    if out_features % rows:
        return f"{out_features} output rows are no multiple of {rows}, of which words of zero points are made"
    return None


def head_reason(name: str, reason: str | None, tied: bool) -> str | None:
    """Why a head is refused."""
    if reason is not None:
        return reason
    return (
        f"{name} has no quantized embedding, and the head is tied to it" if tied else f"{name}'s readers want the head in 16 bits"
    )
