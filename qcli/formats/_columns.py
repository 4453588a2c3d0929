"""What GPTQ's and AWQ's formats share: the weight is stored transposed, [in_features, out_features], in `qweight`, `qzeros` and
`scales`, and all quantized modules have the same bits and the same groups."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qcli.checkpoint.dtypes import CODES, MODEL_DTYPES, TensorSpec
from qcli.checkpoint.layout import Linear
from qcli.formats import Choice, Stored, Weight
from qcli.formats._plain import Plain
from qcli.formats._selection import conv1d_problems, fused_notes, ragged_groups
from qcli.schemes import WHOLE_ROW, Scheme

if TYPE_CHECKING:
    from qcli.checkpoint.safetensors_file import TensorInfo
    from qcli.checkpoint.source import Source

FLOATS = tuple(CODES[name] for name in MODEL_DTYPES)
COMPANIONS = ("qzeros", "scales", "g_idx")


def weight_name(tensor: str) -> str:
    """The weight that a stored tensor stands for, if it holds the codes of one; else itself."""
    return f"{tensor.removesuffix('qweight')}weight" if tensor.endswith(".qweight") else tensor


class Columns(Plain):
    """What the two answer alike."""

    library = "gptqmodel"
    rows_in_words: int  # rows whose number of output features this divides have whole words of zero points

    def refuses_shape(self, scheme: Scheme, out_features: int, in_features: int) -> str | None:
        if reason := ragged_groups(scheme, in_features):
            return reason
        if out_features % self.rows_in_words:
            return f"{out_features} output rows are no multiple of {self.rows_in_words}, of which words of zero points are made"
        return None

    def refuses_mixture(self, schemes: Sequence[Scheme]) -> str | None:
        several = len(set(schemes)) > 1
        return f"{self.name}'s format has one number of bits and one group size for all modules" if several else None

    def refuses(self, scheme: Scheme) -> str | None:
        raise NotImplementedError

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        if reason := self.refuses(head):
            return reason
        if tied:
            return f"{self.name} has no quantized embedding, and the head is tied to it"
        return f"{self.name}'s readers want the head in 16 bits"

    def tensors(self, weight: Weight, scheme: Scheme) -> list[TensorSpec]:
        raise NotImplementedError

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        """The scheme of all modules."""
        raise NotImplementedError

    def chosen(self, choice: Choice) -> Scheme | None:
        """The one scheme of all modules. Others, and modules that readers do not know, become problems."""
        label, schemes = f"{self.name}'s format", list(dict.fromkeys(choice.schemes.values()))
        if len(schemes) > 1:
            choice.problems.append(f"{label} has one number of bits and one group size for all modules, and the recipe has several")
        choice.problems += conv1d_problems(choice, label)
        choice.notes += fused_notes(choice)
        return schemes[0] if schemes else None

    def weight_name(self, tensor: str) -> str:
        return weight_name(tensor)

    def companions(self, tensors: Mapping[str, object]) -> dict[str, str]:
        owners = {}
        for name in tensors:
            module, _, last = name.rpartition(".")
            if last in COMPANIONS and f"{module}.qweight" in tensors:
                owners[name] = f"{module}.qweight"
        return owners

    def scheme_of(self, codes: str, tensors: "Mapping[str, TensorInfo]", config: Mapping[str, Any] | None) -> Scheme | None:
        if not codes.endswith(".qweight") or config is None or not self.owns(config) or not self.passes(config):
            return None
        return self.scheme(config)

    def read_one(self, config: Mapping[str, Any], source: "Source", linear: Linear) -> Stored | None:
        from qcli.formats._reading import Problem, expect, present

        if not linear.tensor.endswith(".qweight"):
            return None
        module, scheme = linear.tensor.removesuffix("qweight"), self.scheme(config)
        names = {}
        for spec in self.tensors(Weight(f"{module}weight", linear.out_features, linear.in_features, "F16"), scheme):
            if spec.name in source.tensors:
                expect(source, spec.name, FLOATS if spec.name.endswith("scales") else (spec.dtype,), spec.shape)
                names[self.attribute(spec.name.removeprefix(module))] = spec.name
            elif not spec.name.endswith("g_idx") or config.get("desc_act"):
                raise Problem(f"{linear.tensor} lacks {spec.name}")
        return Stored(self.name, scheme, linear.out_features, linear.in_features, present(source, names))

    def attribute(self, name: str) -> str:
        return "weight" if name == "qweight" else name

    def renamings(self) -> list[tuple[str, str]]:
        return [("qweight$", "weight")]


def left_alone(choice: Choice) -> list[str]:
    """The linear modules that are not quantized, by full name."""
    return sorted({*choice.layout.candidates} - set(choice.schemes))


def group_size(scheme: Scheme | None) -> int:
    """As configs have it."""
    return scheme.size if scheme and scheme.share == "group" else WHOLE_ROW


def in_columns(bits: int, group_size: int, zero_point: bool) -> Scheme:
    """The scheme that a config's fields say."""
    rows = Scheme(f"w{bits}a16", "rtn", bits, "row", 0, zero_point=zero_point, scale="model")
    return rows if group_size == WHOLE_ROW else replace(rows, share="group", size=group_size)
