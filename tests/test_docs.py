"""The documentation says what the code does: options, names, keys, files, rooms, links, and commands that parse."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import transformers

from qcli import formats
from qcli.schemes import NAMED
from tests.adapters import make_adapter
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
COMMANDS = sorted(path.stem.replace("_", "-") for path in (ROOT / "qcli/commands").glob("[a-z]*.py"))
by_name = {"ids": lambda path: path.name}


def load_options():
    spec = importlib.util.spec_from_file_location("docs_options", DOCS / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


options = load_options()


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in a language; "" is those that name none."""
    return [text for found, text in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S) if found == language]


def rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the table whose first row begins with `heading`."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading}"))
    table = lines[start + 2 :]
    end = next((i for i, line in enumerate(table) if not line.startswith("|")), len(table))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table[:end]]


def code(text: str) -> list[str]:
    """What stands between single backticks outside of fenced blocks."""
    return re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


# The first page


def test_the_readme_is_one_screen_and_installs_before_it_runs():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert text.index("pip install") < text.index("make demo")
    assert text.index("$ qcli generate") < text.index("$ qcli quantize")


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((?:docs/)?([\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked >= {path.name for path in PAGES} - {"README.md"}


@pytest.mark.parametrize("page", PAGES, **by_name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_pictures_are_shown_and_small():
    pictures = sorted((DOCS / "images").iterdir())
    shown = {name for page in PAGES for name in re.findall(r"!\[[^\]]+\]\(images/([\w.-]+)\)", page.read_text())}
    assert pictures and {path.name for path in pictures} == shown
    assert sum(path.stat().st_size for path in pictures) < 300_000


# Options


def test_every_command_has_a_page_with_its_table():
    for name in COMMANDS:
        assert f"<!-- options of {name} -->" in (DOCS / f"{name}.md").read_text()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), **by_name)
def test_tables_of_options_are_fresh(page):
    text = page.read_text()
    assert options.updated(text) == text, "stale: run make docs"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_table_has_every_option_by_all_its_names(name):
    from typer.main import get_command

    from qcli.cli import app

    table = [code(line.split(" | ")[0]) for line in options.table(name).splitlines()[2:]]
    listed = {option for cells in table for cell in cells for option in cell.split("/") if option.startswith("-")}
    parameters = get_command(app).commands[name].params
    expected = {option for each in parameters for option in (*each.opts, *each.secondary_opts) if option.startswith("-")}
    assert listed == expected - {"--help"} and len(table) == len([each for each in parameters if each.name != "help"])


def test_a_stale_table_is_written_anew():
    page = "before\n<!-- options of doctor -->\nold\n<!-- end of options -->\nafter\n"
    after = options.updated(page)
    assert "old" not in after and "| `--json` | Print one JSON object" in after
    assert after.startswith("before\n") and after.endswith("after\n")


# Commands and snippets


def shell_lines() -> list[tuple[str, list[str]]]:
    """(page, words) of every call of qcli in shell blocks and in sentences, without prompts, comments and redirections. In a block
    with prompts the other lines are output."""
    found = []
    for page in PAGES:
        lines = [text for text in code(page.read_text()) if text.startswith("qcli ")]
        for block in blocks(page):
            typed = re.findall(r"^\$ (.*)$", block, re.M) or block.replace("\\\n", " ").splitlines()
            lines += typed
        for line in lines:
            for part in re.split(r"\|\|?|;|>", line.partition("  #")[0]):
                if part.strip().startswith("qcli "):
                    found.append((page.name, shlex.split(part)))
    return found


@pytest.mark.parametrize("page, words", shell_lines(), ids=lambda value: value if isinstance(value, str) else " ".join(value))
def test_commands_in_the_pages_parse(page, words):
    name, *given = words[1:]
    if name.startswith("--"):
        assert name in ("--help", "--version")
        return
    assert name in COMMANDS
    known = {
        option
        for parameter, _, info in options.parameters(name)
        for each in options.names(parameter, info)
        for option in each.split("/")
    }
    for word in given:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, (page, word)


@pytest.mark.parametrize("page", PAGES, **by_name)
def test_snippets_are_python_and_json(page):
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "json"):
        json.loads(block)


def test_recipes_in_the_pages_are_recipes(tmp_path):
    from qcli.recipe import read_recipe

    found = blocks(DOCS / "recipes.md", "json")
    assert len(found) >= 2
    for block in found:
        (tmp_path / "recipe.json").write_text(block)
        recipe = read_recipe(tmp_path / "recipe.json")
        assert recipe.summary() == json.loads(block)


def test_the_snippet_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (snippet,) = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert "down_proj" in capsys.readouterr().out and (tmp_path / "demo-nf4/config.json").exists()
    assert names["model"].num_parameters() > 0


def test_the_snippets_of_the_python_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for snippet in blocks(DOCS / "python.md", "python"):
        exec(compile(snippet, "python.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "[52, 38, 7, 21]" in printed and "trainable params" in printed  # the demo model's outlier features; PEFT


# Methods and formats


def test_the_table_of_methods_is_the_one_of_the_code():
    table = {code(row[0])[0]: row for row in rows(DOCS / "methods.md", "name | bits")}
    assert list(table) == list(NAMED)
    for name, (_, bits, *_, held_by) in table.items():
        scheme = NAMED[name]
        holders = [each.name for each in formats.all_formats() if scheme.bits and each.refuses(scheme) is None]
        assert held_by in (holders or ["none", "-"]) or held_by == ", ".join(holders), name
        assert str(scheme.bits) in bits if scheme.bits else bits == "-", name


def test_the_table_of_formats_is_the_one_of_the_code():
    table = {code(row[0])[0]: code(row[1]) for row in rows(DOCS / "formats.md", "format | holds")}
    assert list(table) == list(formats.NAMES)
    for name, held in table.items():
        assert set(held) == {each for each in formats.written() if formats.get(name).refuses(NAMED[each]) is None}


def test_the_architectures_are_those_that_are_tested():
    from tests.models import ARCHITECTURES

    assert code(rows(DOCS / "quantize.md", "model types")[0][0]) == list(ARCHITECTURES)


def test_options_of_methods_are_named():
    from qcli.methods import option_types

    named = {option for row in rows(DOCS / "methods.md", "name | option") for option in code(row[1])}
    assert named == {option for scheme in NAMED.values() for option in option_types(scheme)}


# What is stable

CHEAP = {
    "quantize --json": ("quantize", "demo", "-o", "made", "--calibrate", "--tokens", "1024", "--json"),
    "quantize --dry-run --json": ("quantize", "demo", "-o", "planned", "--dry-run", "--json"),
    "estimate-memory --json": ("estimate-memory", "demo", "--gpu", "8GB", "--json"),
    "estimate-memory --table --json": ("estimate-memory", "--table", "--json"),
    "info --json": ("info", "demo", "--json"),
    "generate --json": ("generate", "demo", "hi", "--max-new-tokens", "1", "--json"),
    "evaluate --json": ("evaluate", "demo", "--tokens", "64", "--json"),
    "finetune --json": ("finetune", "demo", "train.jsonl", "-o", "trained", "--steps", "1", "--batch", "2", "--json"),
    "finetune --dry-run --json": ("finetune", "demo", "train.jsonl", "-o", "trained", "--dry-run", "--json"),
    "merge --json": ("merge", "adapter", "--output", "merged", "--base", "demo", "--text", "text.txt", "--json"),
    "inspect-outliers --weights-only --json": ("inspect-outliers", "demo", "--weights-only", "--json"),
}


@pytest.mark.parametrize("command", CHEAP)
def test_the_keys_of_json_are_those_of_the_page(command, quick_cli, tmp_path):
    (tmp_path / "demo").symlink_to(ROOT / "examples/demo-model")
    if "adapter" in CHEAP[command]:
        make_adapter(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "demo"), tmp_path / "adapter")
        (tmp_path / "text.txt").write_text("Once upon a time there was a fox.")
    if "train.jsonl" in CHEAP[command]:
        (tmp_path / "train.jsonl").write_text('{"prompt": "Once", "completion": " upon a time"}\n' * 9)
    table = {code(row[0])[0]: code(row[1]) for row in rows(DOCS / "stability.md", "command | keys")}
    done = quick_cli(*CHEAP[command])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == table[command]
    for names, of, keys in rows(DOCS / "stability.md", "inside | of"):
        for name in code(names) if code(of) == [command] else ():
            if name == "workers":  # of a cluster: tests/cluster/test_quantize.py
                continue
            one = found[name][0] if isinstance(found[name], list) else found[name]
            assert list(one) == [key for key in code(keys) if key != "--gpu"], name


def test_the_keys_of_qcli_json_are_those_of_the_page(tmp_path):
    import qcli

    qcli.quantize(str(ROOT / "examples/demo-model"), tmp_path / "made", calibrate=True, tokens=1024)
    listed = [key for row in rows(DOCS / "stability.md", "key | content") for key in code(row[0])]
    assert list(json.loads((tmp_path / "made/qcli.json").read_text())) == listed


def test_the_exit_codes_are_those_of_the_page():
    from qcli import errors
    from qcli.commands.estimate_memory import DOES_NOT_FIT
    from qcli.commands.quantize import WORSE

    listed = {int(row[0]) for row in rows(DOCS / "stability.md", "code | meaning")}
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.QcliError)}
    assert listed == raised | {0, DOES_NOT_FIT, WORSE}


# The house


@pytest.mark.parametrize("page", [DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"], **by_name)
def test_files_that_a_page_names_are_there(page):
    named = {text for text in code(page.read_text()) if re.fullmatch(r"[\w./-]+(\.(py|cpp|cu|md|toml|txt)|/)", text)}
    missing = [name for name in named if "NAME" not in name and not ((ROOT / name).exists() or (ROOT / "qcli" / name).exists())]
    assert named and not missing


def test_quantize_is_followed_through_at_most_nine_files():
    text = (DOCS / "architecture.md").read_text()
    steps = re.findall(r"^\d+\. `([\w./]+)`", text.partition("## Following `quantize`")[2].partition("\n## ")[0], re.M)
    assert steps[0] == "commands/quantize.py" and len(steps) <= 9
    assert all((ROOT / "qcli" / step).exists() for step in steps)


def test_rooms_use_only_rooms_above_them():
    """The table of rooms in docs/architecture.md against the imports of every file."""
    places = {}
    for floor, row in enumerate(rows(DOCS / "architecture.md", "room | what")):
        for name in code(row[0]):
            places[name.rstrip("/").removesuffix(".py")] = floor
    package = ROOT / "qcli"
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert set(places) == there - {"__init__", "__main__"}
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        if room not in places:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qcli":
                names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
                for used in names:
                    assert used not in places or places[used] <= places[room], f"{path}: {used} lies below {room}"


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "qcli/py.typed").read_bytes() == b""
