"""Parses PTX text, as nvcc writes it, into instructions with resolved operands.

Terms are those of NVIDIA's "Parallel Thread Execution ISA": entry, function, state space, special register. Registers are numbered
across all functions of a module, because no function of ours calls itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Register:
    """A register of `bits` bits, 1 for a predicate. `number` is its index in the machine."""

    number: int
    bits: int


class Parameter(Register):
    """A register that passes a value to a call. `ld.param` and `st.param` name it as if it were an address."""


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the `bits` of a float."""

    value: int
    bits: int | None = None


@dataclass(frozen=True)
class Name:
    """A special register, a label, a variable in shared memory, a parameter."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: "Register | Name | Immediate"
    offset: int


Operand = Register | Immediate | Name | Address | tuple  # a tuple is a vector, or a result with its predicate


@dataclass
class Instruction:
    """One statement. `opcode` is split at its dots; `guard` is a predicate register and whether it is negated."""

    opcode: tuple[str, ...]
    operands: list[Operand]
    guard: tuple[Register, bool] | None
    text: str
    line: str  # in the CUDA source if the PTX has it, else in the PTX
    step: Callable | None = None  # the function that runs it, set at its first use


@dataclass
class Variable:
    """An array in shared memory. `size` is None if the launch sets it."""

    name: str
    align: int
    size: int | None


@dataclass
class Function:
    """An entry (a kernel) or a function that entries call. An entry's parameters are in the buffer of its arguments, as name ->
    (offset, size). A function's parameters are registers."""

    name: str
    first: int  # the number of its first instruction
    arguments: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters: list[Register] = field(default_factory=list)
    shared: list[Variable] = field(default_factory=list)
    most_threads: int = 1024


@dataclass
class Module:
    """The content of a PTX file."""

    instructions: list[Instruction]
    functions: dict[str, Function]
    labels: dict[str, int]
    registers: list[int]  # the bits of each


class PtxError(Exception):
    """Text that this parser does not know, or an instruction that this machine does not know."""


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_HEAD = re.compile(r"\.(entry|func)\s+([\w$]+)\s*\(([^)]*)\)([^{};]*)\{")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)(?:\[(\d*)\])")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)*?(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
_CALL = re.compile(r"(?:\(.*?\)\s*,\s*)?([\w$]+)\s*,?\s*\(([^)]*)\)", re.DOTALL)
_PART = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*")
_RANGE = re.compile(r"(%\w+?)<\d+>")


def parse(text: str) -> Module:
    """Raises PtxError."""
    text = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text, re.MULTILINE))
    text = re.sub(r"^(\s*\.loc\s[^\n]*)$", r"\1;", text, flags=re.MULTILINE)
    text = re.sub(r"^(\s*[$\w]+:)\s*$", r"\1;", text, flags=re.MULTILINE)
    module = Module([], {}, {}, [])
    position = 0
    common: list[Variable] = []
    while head := _HEAD.search(text, position):
        common += _shared(text[position : head.start()])
        end = _end(text, head.end())
        reader = _Body(module, files, head, 1 + text.count("\n", 0, head.end()))
        reader.read(text[head.end() : end])
        reader.function.shared[:0] = common
        position = end + 1
    return module


def _shared(text: str) -> list[Variable]:
    return [Variable(name, int(align), int(size) if size else None) for align, name, size in _SHARED.findall(text)]


def _end(text: str, position: int) -> int:
    """The position where the brace closes that opened before `position`."""
    depth = 1
    for found in re.finditer(r"[{}]", text[position:]):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            return position + found.start()
    raise PtxError("a body has no end")


class _Body:
    """Reads the body of an entry or a function into the module."""

    def __init__(self, module: Module, files: dict[str, str], head: re.Match, line: int):
        self.module, self.files, self.line = module, files, line
        self.source = ""
        self.scopes: list[dict[str, Register | int]] = [{}]  # an int stands for the bits of a numbered range
        self.function = Function(head[2], len(module.instructions))
        module.functions[head[2]] = self.function
        offset = 0
        for align, kind, name, count in _PARAMETER.findall(head[3]):
            size = _bits(kind) // 8 * int(count or 1)
            if head[1] == "func":
                self.function.parameters.append(self._declare(name, 8 * size, Parameter))
                continue
            offset += -offset % int(align or size)
            self.function.arguments[name] = offset, size
            offset += size
        if most := re.search(r"\.(?:maxntid|reqntid)\s+(\d+)", head[4]):
            self.function.most_threads = int(most[1])

    def read(self, body: str) -> None:
        """Statements end at a semicolon. A brace at the start of a statement opens a scope, elsewhere it opens a vector."""
        begin, vector = 0, False
        for found in re.finditer(r"[;{}]", body):
            pending = body[begin : found.start()].strip()
            if found[0] == "{" and pending:
                vector = True
            elif found[0] == "}" and vector:
                vector = False
            else:
                line = self.line + body.count("\n", 0, found.start()) - pending.count("\n")
                if found[0] == "{":
                    self.scopes.append({})
                elif found[0] == "}":
                    self.scopes.pop()
                elif pending:
                    self._statement(" ".join(pending.split()), line)
                begin = found.end()

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".loc"):
            _, file, number, *_ = text.replace(",", " ").split()
            self.source = f"{self.files.get(file, file)}:{number}"
        elif text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in names.split(","):
                numbered = _RANGE.fullmatch(name.strip())
                if numbered:
                    self.scopes[-1][numbered[1]] = _bits(kind[1:])
                else:
                    self._declare(name.strip(), _bits(kind[1:]))
        elif text.startswith(".param"):
            for _, kind, name, _ in _PARAMETER.findall(text):
                self._declare(name, _bits(kind), Parameter)
        elif text.startswith(".shared"):
            self.function.shared += _shared(text)
        elif text.endswith(":"):
            self.module.labels[text[:-1]] = len(self.module.instructions)
        elif not text.startswith("."):
            self.module.instructions.append(self._instruction(text, self.source or f"line {line} of the PTX"))

    def _instruction(self, text: str, line: str) -> Instruction:
        guard, rest = None, text
        if text.startswith("@"):
            predicate, rest = text[1:].split(None, 1)
            guard = self._operand(predicate.lstrip("!")), predicate.startswith("!")
        opcode, _, rest = rest.partition(" ")
        if opcode.startswith("call"):
            found = _CALL.fullmatch(rest.strip())
            operands = [Name(found[1]), *(self._operand(name) for name in found[2].split(",") if name.strip())]
        else:
            operands = [self._operand(part) for part in _PART.findall(rest)]
        return Instruction(tuple(opcode.split(".")), operands, guard, text, line)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        if text[0] == "{":
            return tuple(self._operand(part) for part in text[1:-1].split(","))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            return Address(self._operand(base), int(offset or "0", 0))
        if "|" in text:
            return tuple(self._operand(part) for part in text.split("|"))
        if found := re.fullmatch(r"0([fFdD])([0-9A-Fa-f]+)", text):
            return Immediate(int(found[2], 16), 32 if found[1] in "fF" else 64)
        if re.fullmatch(r"-?\d+U?|-?0[xX][0-9A-Fa-f]+U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        return self._register(text) or Name(text)

    def _register(self, name: str) -> Register | None:
        prefix = re.match(r"%[a-z]+(?=\d+$)", name)
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
            if prefix and prefix[0] in scope:
                scope[name] = self._new(scope[prefix[0]])
                return scope[name]
        return None

    def _declare(self, name: str, bits: int, kind: type[Register] = Register) -> Register:
        self.scopes[-1][name] = self._new(bits, kind)
        return self.scopes[-1][name]

    def _new(self, bits: int, kind: type[Register] = Register) -> Register:
        self.module.registers.append(bits)
        return kind(len(self.module.registers) - 1, bits)


def _bits(kind: str) -> int:
    return 1 if kind == "pred" else int(re.sub(r"\D", "", kind))
