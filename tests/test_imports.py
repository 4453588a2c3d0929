"""The rooms of the house, read off the syntax tree, and what a start costs."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "qcli"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, with full dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def users(package: str) -> set[str]:
    """The files that import `package`, relative to qcli/."""
    return {str(p.relative_to(PACKAGE)) for p in FILES if any(i == package or i.startswith(f"{package}.") for i in imports(p))}


def test_typer_stays_in_the_command_line():
    assert users("typer") <= {"cli.py"} | {str(p.relative_to(PACKAGE)) for p in (PACKAGE / "commands").glob("*.py")}
    assert users("click") == set()


def test_rich_stays_in_the_console():
    assert users("rich") == {"console.py"}


def test_ray_stays_in_the_engine():
    assert users("ray") == {"cluster/engine.py"}


def test_pycuda_and_ctypes_stay_in_the_runtime():
    assert users("pycuda") <= {"runtime/cuda.py"}
    assert all(name.startswith("runtime/") for name in users("ctypes"))


# The floors of the house from the ground up. A room uses what stands below it, and nothing beside or above it.
FLOORS = (
    {"errors", "codebooks", "packing", "process"},
    {"sizes", "files", "runtime", "progress"},
    {"devices", "checkpoint", "ops", "cluster"},
    {"schemes"},
    {"recipe", "formats"},
    {"methods", "memory"},
    {"nn"},
    {"loading"},
    {"streaming", "generation"},
    {"calibration"},
    {"evaluation"},
    {"quantization", "outliers", "doctor"},
    {"finetuning"},
    {"console"},
    {"commands"},
    {"cli"},
    {"__main__"},
)


def room_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def test_every_room_has_a_floor():
    rooms = {p.stem if p.is_file() else p.name for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms - {"__init__"} == set().union(*FLOORS)


def test_nothing_points_back_up():
    height = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for path in FILES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for used in imports(path):
            if used.startswith("qcli.") and room_of(used) in height and room_of(used) != room:
                assert height[room_of(used)] < height[room], f"{path} uses {used}"


def test_only_the_console_prints():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", path


def test_no_submodule_bears_the_name_of_a_public_function():
    import qcli

    names = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or p.is_dir()}
    assert names.isdisjoint(qcli.__all__)


def test_files_stay_readable():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 320, path
        assert path.stem != "utils"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_has_a_docstring_or_is_empty(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree) or path.name == "__main__.py"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_loads_no_heavy_library():
    heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "psutil"}
    assert loaded_after("import qcli.cli").isdisjoint(heavy)
    assert loaded_after("import qcli").isdisjoint(heavy | {"typer", "rich"})
    assert loaded_after("import qcli.checkpoint.safetensors_file").isdisjoint(heavy)
    assert loaded_after("import qcli.checkpoint.source, qcli.formats.describe").isdisjoint(heavy)
    assert loaded_after("import qcli.quantization.quantize, qcli.loading.opening").isdisjoint(heavy)


@pytest.mark.parametrize(
    "arguments",
    [
        ("examples/demo-model", "--gpu", "24GB", "--explain"),
        ("examples/demo-model", *(f"--bits={name}" for name in ("rtn", "awq", "nf3", "kmeans", "nvfp4"))),
        ("--params", "7B", "--train", "qlora"),
        ("--table",),
        ("--gpu", "24GB"),
    ],
    ids=" ".join,
)
def test_an_estimate_loads_neither_torch_nor_transformers_nor_numpy(arguments):
    run = f"app(args={['estimate-memory', *arguments]!r}, standalone_mode=False)"
    quietly = "import contextlib\nfrom qcli.cli import app\nwith contextlib.redirect_stdout(open(os.devnull, 'w')): "
    loaded = loaded_after(f"import os\nos.chdir({str(ROOT)!r})\n{quietly}{run}")
    assert "qcli.memory.paper_table" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "huggingface_hub", "matplotlib"})


def loaded_after_command(*arguments: str) -> set[str]:
    """What `qcli ARGUMENTS` has loaded when it ends, however it ends."""
    quietly = "import contextlib\nfrom qcli.cli import app\nwith contextlib.redirect_stdout(open(os.devnull, 'w')), ended: "
    ended = "import os, contextlib\nended = contextlib.suppress(SystemExit)\n"
    return loaded_after(f"{ended}{quietly}app(args={list(arguments)!r}, standalone_mode=False)")


def test_quantizing_a_plain_model_loads_torch_alone(tmp_path):
    loaded = loaded_after_command("quantize", str(ROOT / "examples/demo-model"), "--output", str(tmp_path / "out"))
    assert (tmp_path / "out/model.safetensors").exists() and "torch" in loaded
    assert loaded.isdisjoint({"transformers", "huggingface_hub", "accelerate", "torch._dynamo", "sympy"})


@pytest.mark.parametrize("arguments", [("quantize", "--bits", "4"), ("generate", "Once"), ("info",)], ids=" ".join)
def test_a_folder_that_is_not_there_is_refused_before_anything_is_loaded(arguments, tmp_path):
    command, *rest = arguments
    loaded = loaded_after_command(command, str(tmp_path / "no/such/model"), *rest)
    assert "qcli.checkpoint.source" in loaded
    assert loaded.isdisjoint({"torch", "transformers", "numpy", "huggingface_hub"})


BARE = """
import typer
app = typer.Typer(help="Bare.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
{commands}
app(prog_name="bare")
"""


@pytest.mark.slow
def test_help_costs_at_most_one_and_a_half_bare_typer_apps(tmp_path):
    """Medians of alternating runs. Marked slow, and run by hand, because it is a matter of time."""
    names = [p.stem for p in (PACKAGE / "commands").glob("[a-z]*.py")]
    commands = "\n".join(f"@app.command()\ndef {name}(model: str):\n    'Help of {name}.'" for name in names)
    (tmp_path / "bare.py").write_text(BARE.format(commands=commands))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    times = {"bare": [], "qcli": []}
    for _ in range(15):
        for name, command in (("bare", [str(tmp_path / "bare.py")]), ("qcli", ["-m", "qcli"])):
            started = time.perf_counter()
            subprocess.run([sys.executable, *command, "--help"], env=environment, capture_output=True, check=True)
            times[name].append(time.perf_counter() - started)
    bare, ours = (sorted(times[name])[7] for name in ("bare", "qcli"))
    print(f"bare {bare:.3f} s, qcli {ours:.3f} s, ratio {ours / bare:.2f}")
    assert ours <= 1.5 * bare
