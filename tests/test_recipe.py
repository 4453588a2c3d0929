"""Which module gets what: rules in order, as JSON and back, and the same from every way to write it."""

import json

import pytest
import torch

import qcli
from qcli.errors import CheckpointError, PlanError, UsageError
from qcli.methods.choosing import methods_of, recipe_in_force
from qcli.quantization.plan_json import from_json, to_json
from qcli.quantization.quantize import make_plan, run_plan
from qcli.recipe import KEEP, Choice, Recipe, read_recipe, recipe_of
from tests.conftest import ROOT

DEMO = str(ROOT / "examples" / "demo-model")
MIXED = {
    "default": {"method": "nf4"},
    "rules": [["*.down_proj", {"method": "nf4-plain", "options": {"block_size": 32}}], ["model.layers.0", {"method": "keep"}]],
}


def test_the_first_rule_that_matches_a_module_or_a_parent_decides():
    recipe = recipe_of(MIXED, "test")
    assert recipe.choice("model.layers.3.mlp.down_proj") == Choice("nf4-plain", (("block_size", 32),))
    assert recipe.choice("model.layers.0.mlp.down_proj").method == "nf4-plain"
    assert recipe.choice("model.layers.0.mlp.up_proj").keeps and not recipe.choice("model.layers.01.mlp.up_proj").keeps
    assert recipe.choice("model.layers.1.mlp.up_proj") == Choice("nf4")
    assert recipe.unmatched(["model.layers.0.mlp.down_proj"]) == []
    assert recipe.unmatched(["model.layers.1.mlp.up_proj"]) == ["*.down_proj", "model.layers.0"]
    assert recipe_of(recipe.summary(), "test") == recipe


def test_options_make_the_recipe_that_a_file_would(tmp_path):
    asked, rest = recipe_in_force(None, 4, None, {"block_size": 128, "double_quant": None}, ["*.v_proj"], None, {})
    assert rest == {}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(asked.summary()))
    assert read_recipe(path) == asked == Recipe(Choice("nf4", (("block_size", 128),)), (("*.v_proj", Choice(KEEP)),))


def test_a_plan_is_read_for_its_recipe(quick_cli, tmp_path):
    printed = quick_cli("quantize", DEMO, "--method", "fp4", "--skip", "*.v_proj", "--dry-run", "--json", "-o", "out")
    (tmp_path / "plan.json").write_text(printed.stdout)
    assert read_recipe(tmp_path / "plan.json") == Recipe(Choice("fp4"), (("*.v_proj", Choice(KEEP)),))
    plan, again = (
        json.loads(done.stdout)
        for done in (printed, quick_cli("quantize", DEMO, "--recipe", "plan.json", "--dry-run", "--json", "-o", "out"))
    )
    assert again["recipe"] == plan["recipe"] and again["tensors"] == plan["tensors"]


def test_methods_that_no_other_format_holds_together_are_in_qclis_own(quick_cli, tmp_path):
    mixed = {"default": {"method": "nf4"}, "rules": [["*.v_proj", {"method": "rtn"}]]}
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    done = quick_cli("quantize", DEMO, "--recipe", "mixed.json", "--dry-run", "-o", "out", "--json")
    plan = json.loads(done.stdout)
    assert plan["format"] == "qcli" and "qcli alone reads the result" in plan["notes"]
    (tmp_path / "mixed.json").write_text(json.dumps(mixed | {"format": "bitsandbytes"}))
    done = quick_cli("quantize", DEMO, "--recipe", "mixed.json", "--dry-run", "-o", "out")
    assert done.returncode == 2 and "not rtn" in done.stderr and "Leave out the format" in done.stderr
    done = quick_cli("quantize", DEMO, "--method", "llm-int8-paper", "--dry-run", "-o", "out")
    assert done.returncode == 2 and "evaluate --methods measures what no format holds" in done.stderr


@pytest.mark.parametrize(
    "value, words",
    [
        ({}, "has no default"),
        ({"recipe": {"default": {"method": 4}}}, "recipe: default: method is 4"),
        ({"default": {}}, "has no method"),
        ({"default": {"method": 4}}, "method is 4"),
        ({"default": {"method": "nf5"}}, "there is no method 'nf5'"),
        ({"default": {"method": "nf4"}, "rule": []}, "has a field 'rule'"),
        ({"default": {"method": "nf4"}, "rules": {}}, "rules is {}"),
        ({"default": {"method": "nf4"}, "rules": [["a"]]}, "rule 1 is"),
        ({"default": {"method": "nf4"}, "rules": [["a", {"method": "keep", "why": 1}]]}, "has a field 'why'"),
        ({"default": {"method": "nf4", "options": [1]}}, "options is"),
        ({"default": {"method": "nf4"}, "format": 3}, "format is 3"),
        ([], "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_wrong_recipe_is_a_usage_error(value, words, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(UsageError) as refused:
        read_recipe(path)
    assert words in refused.value.message


def test_a_recipe_that_keeps_everything_or_asks_twice_is_refused():
    with pytest.raises(UsageError, match="keeps every module"):
        methods_of(Recipe(Choice(KEEP)))
    with pytest.raises(UsageError, match="--recipe and --bits were both given"):
        recipe_in_force(Recipe(Choice("nf4")), 4, None, {})
    with pytest.raises(UsageError, match="without --bits"):
        qcli.load(DEMO, block_size=64)


def test_a_mixed_recipe_quantizes_and_runs_and_bitsandbytes_loads_it(tmp_path, quick_cli):
    """Blocks of two sizes, with and without double quantization, in one checkpoint: each quant_state says which."""
    import transformers

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(MIXED))
    done = quick_cli("quantize", DEMO, "--recipe", path, "--output", tmp_path / "out", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["quantized_modules"] == 42 - 7 + 1
    described = json.loads(quick_cli("quantize", DEMO, "--recipe", path, "--output", tmp_path / "x", "--dry-run", "--json").stdout)
    assert described["recipe"] == MIXED and described["format"] == "bitsandbytes"
    to = {tensor["name"]: tensor["to"] for tensor in described["tensors"]}
    assert to["model.layers.0.mlp.up_proj.weight"] == "bfloat16" and to["model.layers.0.mlp.down_proj.weight"] == "nf4-plain"
    ours, _ = qcli.load(str(tmp_path / "out"), device="cpu")
    assert ours.model.layers[1].mlp.down_proj.block_size == 32 and ours.model.layers[1].mlp.up_proj.block_size == 64
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        a, b = ours(ids).logits.float(), theirs(ids).logits.float()
    assert (a - b).norm() < 0.02 * b.norm()


def test_what_a_format_cannot_mix_is_a_problem_of_the_plan():
    mixed = {"default": {"method": "nf4"}, "rules": [["*.o_proj", {"method": "llm-int8"}]], "format": "bitsandbytes"}
    recipe = recipe_of(mixed, "test")
    with pytest.raises(PlanError, match="one number of bits and one threshold"):
        make_plan(DEMO, "/tmp/never", recipe=recipe).check()


def test_a_plan_goes_to_json_and_back(tmp_path):
    recipe = recipe_of(MIXED, "test")
    plan = make_plan(DEMO, tmp_path / "out", recipe=recipe)
    value = json.loads(json.dumps(to_json(plan)))
    again = from_json(value)
    assert again.work == plan.work and again.shards == plan.shards and again.identity == plan.identity
    assert again.config == plan.config and again.working_memory == plan.working_memory
    run_plan(again)
    qcli.quantize(DEMO, tmp_path / "whole", recipe=recipe)
    for path in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    value["source"]["fingerprint"] = "another"
    with pytest.raises(CheckpointError, match="has changed since it was planned for"):
        from_json(value)
