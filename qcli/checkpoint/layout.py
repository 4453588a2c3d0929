"""The modules of a model as far as quantization needs them. qcli/checkpoint/modules.py finds them."""

import re
from dataclasses import dataclass, field
from functools import cache


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear module: `tensor` is its weight's name in the checkpoint, `module` its name in transformers.

    `transposed` is True for transformers' Conv1D, whose weight is stored as [in_features, out_features].
    """

    tensor: str
    module: str
    out_features: int
    in_features: int
    transposed: bool = False


@dataclass(frozen=True)
class OutputHead:
    """The output head of a language model, which predicts tokens: y = x W^T with W [vocabulary, hidden_size].

    `linear` is the stored weight. If the head is `tied` to the embedding, one of the two is stored, and `linear.module` is the one.
    `module` and `embedding` are the names of the head and of the input embedding in transformers.
    """

    linear: Linear
    module: str
    embedding: str
    tied: bool


@cache
def _compiled(patterns: tuple[str, ...]) -> list[re.Pattern[str]]:
    """What matches the start of a module's name as transformers matches its skip lists. Names without an operator, of which a list
    may hold thousands, are one pattern."""
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    plain = [key for key in patterns if re.fullmatch(r"[\w.]*", key)]
    found = [re.compile(rf"(?:{key}){boundary}") for key in sorted(set(patterns) - set(plain))]
    return found + ([re.compile(rf"(?:{'|'.join(plain)}){boundary}")] if plain else [])


@dataclass
class Layout:
    """The modules of a model, as far as quantization needs them."""

    decided_by: str
    linears: dict[str, Linear] = field(default_factory=dict)  # by tensor name
    candidates: list[str] = field(default_factory=list)  # every module that transformers would convert
    explicit_skip: bool = False  # the loaders' default is unknown, so the config must spell out the skip list
    modules: dict[str, str] = field(default_factory=dict)  # every tensor name -> its name in transformers
    default_skip: list[str] = field(default_factory=list)  # modules that transformers skips when no list is given
    always_skip: list[str] = field(default_factory=list)  # patterns that it skips whatever the list says
    keep_fp32: list[str] = field(default_factory=list)  # patterns kept in float32 when the model's dtype is float16
    keep_fp32_strict: list[str] = field(default_factory=list)  # patterns kept in float32 when it is float16 or bfloat16
    missing: list[str] = field(default_factory=list)  # parameters of the model that no tensor provides
    misshaped: dict[str, tuple] = field(default_factory=dict)  # tensor name -> (stored shape, the model's shape)
    unknown: set[str] = field(default_factory=set)  # tensors that do not belong to the model
    linear_kinds: list[str] = field(default_factory=list)  # class names of linear modules, converted or not
    head: OutputHead | None = None  # None where none could be quantized
    no_head: str = "its modules are known by name and shape alone"  # why not, after "no head can be quantized: "
    expert_parameters: int = 0  # count in fused 3-D expert tensors, which are not Linear modules
    notes: list[str] = field(default_factory=list)

    def skipped(self, module: str, skip: list[str] | None) -> bool:
        """Whether transformers skips `module`, given the config's skip list (None: its own default)."""
        patterns = tuple((self.default_skip if skip is None else skip) + self.always_skip)
        return module.endswith(patterns) or any(pattern.match(module) for pattern in _compiled(patterns))

    def linear(self, tensor: str) -> Linear | None:
        """The module whose weight `tensor` is: a linear one, or the head; None for any other tensor."""
        if self.head is not None and self.head.linear.tensor == tensor:
            return self.head.linear
        return self.linears.get(tensor)

    def quantizable(self) -> list[Linear]:
        """The linear modules that transformers converts by default."""
        return [linear for linear in self.linears.values() if not self.skipped(linear.module, None)]

    def stays_fp32(self, tensor: str, dtype: str) -> bool:
        """Whether transformers keeps the unquantized `tensor` in float32 when the model's dtype is `dtype`."""
        patterns = list(self.keep_fp32_strict) if dtype in ("F16", "BF16") else []
        patterns += self.keep_fp32 if dtype == "F16" else []
        return any(re.search(p.replace("*", ".*"), self.modules.get(tensor, tensor)) for p in patterns)
