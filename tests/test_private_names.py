"""The list of private names against qcli's source, read off the syntax tree, and against the installed libraries."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from qcli.checkpoint.modules import transformers_class
from qcli.checkpoint.source import open_source
from qcli.loading.transformers_quantizer import QcliQuantizer, _Quantize
from tests.conftest import ROOT
from tests.models import make_model
from tests.private_names import PRIVATE

PACKAGE = ROOT / "qcli"
TREES = {str(p.relative_to(PACKAGE)): ast.parse(p.read_text()) for p in sorted(PACKAGE.rglob("*.py"))}
LISTED = {(entry.name.replace(": ", ".").rpartition(".")[2], file) for entry in PRIVATE for file in entry.files}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """Private attributes of the classes of a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found |= {inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)}
            fields = [inner for inner in node.body if isinstance(inner, (ast.Assign, ast.AnnAssign))]
            names = [name for field in fields for name in ast.walk(field) if isinstance(name, ast.Name)]
            found |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


OWN = {file: own_names(tree) for file, tree in TREES.items()}
ANYWHERE = set().union(*OWN.values())


def foreign_attributes(file: str) -> set[str]:
    """Private names that qcli does not define, as in `model._x` and getattr(model, "_x"), and x of `torch._module.x`."""
    tree, found = TREES[file], set()
    # torch._module of torch._module.x and of getattr(torch._module, "_x")
    inside = {n.value for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    inside |= {n.args[0] for n in ast.walk(tree) if isinstance(n, ast.Call) and n.args}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of, _, _ = ast.unparse(node).rpartition(".")
            if of.startswith("torch._") or (of == "torch" and is_private(node.attr)):
                found |= set() if node in inside else {node.attr}
            elif is_private(node.attr):
                found |= {node.attr} - (OWN[file] if of == "self" else ANYWHERE)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and is_private(str(a.value))} - ANYWHERE
    return found


def foreign_imports(tree: ast.AST) -> set[str]:
    """Names from a module with a private part, and those of transformers that it does not offer at its top."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.module.startswith("qcli"):
            private = any(map(is_private, node.module.split(".")))
            hidden = node.module.startswith("transformers.")
            found |= {
                alias.name
                for alias in node.names
                if private or is_private(alias.name) or (hidden and not hasattr(transformers, alias.name))
            }
    return found


def test_every_private_name_is_listed():
    for file, tree in TREES.items():
        used = foreign_attributes(file) | foreign_imports(tree)
        assert {(name, file) for name in used} - LISTED == set()


def test_what_is_listed_is_used():
    for name, file in LISTED:
        found = {n.attr for n in ast.walk(TREES[file]) if isinstance(n, ast.Attribute)}
        found |= {n.name for n in ast.walk(TREES[file]) if isinstance(n, (ast.alias, ast.FunctionDef))}
        found |= {n.value for n in ast.walk(TREES[file]) if isinstance(n, ast.Constant)}
        assert name in found, (name, file)


def test_private_methods_that_are_overridden_are_listed():
    for file in TREES.keys() - {"__main__.py"}:
        name = ".".join(["qcli", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
        for cls in vars(importlib.import_module(name)).values():
            if isinstance(cls, type) and cls.__module__ == name:
                foreign = [base for base in cls.__mro__[1:-1] if not base.__module__.startswith("qcli")]
                own = {name for name, value in vars(cls).items() if is_private(name) and callable(value)}
                own -= {"_backward_cls"}  # every torch.autograd.Function gets one
                overridden = {name for name in own if any(name in vars(base) for base in foreign)}
                assert overridden <= {name for name, _ in LISTED}, cls


@pytest.mark.parametrize("entry", [e for e in PRIVATE if ": " not in e.name], ids=lambda e: e.name)
def test_the_installed_library_has_it(entry):
    parts = entry.name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            there = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            there = getattr(there, part)
        break
    assert there is not importlib.import_module(parts[0])


@pytest.mark.parametrize("entry", PRIVATE, ids=lambda e: e.name)
def test_the_test_that_notices_is_there(entry):
    file, _, name = entry.noticed_by.partition("::")
    tree = ast.parse(Path(ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("cls", [QcliQuantizer, _Quantize])
def test_the_hooks_that_transformers_calls_are_still_its_own(cls):
    """A hook renamed there would never be called here, without a word."""
    base = cls.__mro__[1]
    hooks = {name for name in vars(cls) if not name.startswith("_") and name != "requires_calibration"}
    assert hooks and hooks <= set(dir(base))


def test_torch_tells_who_watches_a_call():
    class Dispatch(TorchDispatchMode):
        pass

    class Function(TorchFunctionMode):
        pass

    def seen():
        stack = torch._C._functorch.peek_interpreter_stack()
        return torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack(), stack is not None

    assert seen() == (0, 0, False)
    with Dispatch():
        assert seen() == (1, 0, False)
    with Function():
        assert seen() == (0, 1, False)
    inside = []
    torch.func.vmap(lambda x: inside.append(seen()) or x)(torch.zeros(2))
    assert inside == [(0, 0, True)]


def test_a_config_without_architectures_finds_its_class(tmp_path):
    make_model("llama", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.architectures = None
    config.save_pretrained(tmp_path)
    assert transformers_class(open_source(str(tmp_path), None), False)[0] is transformers.LlamaForCausalLM


def test_a_class_of_the_models_own_code_is_found(tmp_path):
    make_model("llama", tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["Mine"]
    config.auto_map = {"AutoModelForCausalLM": "mine.Mine"}
    config.save_pretrained(tmp_path)
    (tmp_path / "mine.py").write_text("from transformers import LlamaForCausalLM\n\n\nclass Mine(LlamaForCausalLM):\n    pass\n")
    found, _ = transformers_class(open_source(str(tmp_path), None), True)
    assert found.__name__ == "Mine" and issubclass(found, transformers.LlamaForCausalLM)
