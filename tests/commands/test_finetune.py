"""`qcli finetune`: what it prints, and what it refuses."""

import json

import pytest

from qcli.errors import QcliWarning
from tests.conftest import ROOT

DEMO = ROOT / "examples" / "demo-model"
LINES = [
    {"prompt": "A fox named Ada:", "completion": f" Once upon a time there was a fox. {'The end. ' * (i % 3)}"} for i in range(12)
]
QUICK = ("--steps", "2", "--batch", "4", "--lr", "5e-3", "--device", "cpu")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path / "train.jsonl"


def test_a_dry_run_shows_the_plan_and_writes_nothing(quick_cli, data, tmp_path):
    done = quick_cli("finetune", DEMO, data, "--bits", "4", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "12 examples (prompts with completions), 11 rows to train on, 1 held out" in done.stdout
    assert "rank 16, alpha 32, on 42 modules" in done.stdout and "245,760 parameters" in done.stdout
    assert "steps: 3 of 11 rows, 3 epochs; learning rate 0.0002, cosine" in done.stdout
    assert "A fox named Ada:[[ Once upon a time there was a fox." in done.stdout and "</s>]]" in done.stdout
    assert "memory: about" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


def test_a_run_says_what_it_did(quick_cli, data, tmp_path):
    done = quick_cli("finetune", DEMO, data, "--bits", "4", "-o", "adapter", "--plot", "losses.png", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "the first example, with what is learnt of it marked:" in done.stderr  # talk, and no result
    assert "prompt: A fox named Ada:" in done.stdout and "  before: " in done.stdout and "  after:  " in done.stdout
    assert "adapter: held-out loss " in done.stdout and "the base is unchanged" in done.stdout
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    again = quick_cli("finetune", DEMO, data, "--bits", "4", "-o", "adapter", *QUICK)
    assert again.returncode == 1 and "adapter exists already" in again.stderr
    told = quick_cli("generate", DEMO, "--bits", "4", "--adapter", "adapter", "A fox named Ada:", "--max-new-tokens", "4")
    assert told.returncode == 0 and "warning" not in told.stderr, told.stderr
    with pytest.warns(QcliWarning, match="quantized to nf4, and it is read quantized to llm-int8"):
        quick_cli("generate", DEMO, "--bits", "8", "--adapter", "adapter", "A fox named Ada:", "--max-new-tokens", "4")


@pytest.mark.parametrize(
    "lines, options, words, code",
    [
        (['{"prompt": "a", "completion": "b"}', "{"], (), "train.jsonl, line 2 is not valid JSON", 2),
        (['{"prompt": "a", "completion": "b"}', '{"text": "c"}'], (), "line 2 is a text", 2),
        ([], (), "train.jsonl holds no example", 2),
        (
            ['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'],
            (),
            "has no chat template",
            1,
        ),
        (['{"prompt": "a", "completion": "%s"}' % ("b " * 600)], (), "longer than --max-tokens, which is 512", 2),
        (['{"prompt": "a", "completion": "b"}'], ("--bits", "5"), "5", 2),
        (['{"prompt": "a", "completion": "b"}'], ("--eval", "2"), "--eval is 2", 2),
        (['{"prompt": "a", "completion": "b"}'], ("--set", "optimizer=sgd"), "optimizer is 'sgd'", 2),
        (['{"prompt": "a", "completion": "b"}'], ("--plot", "losses.gif"), "a figure is written as .png", 2),
        (['{"prompt": "a", "completion": "b"}'], ("--rank", "0"), "--rank is 0, expected 1 to", 2),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(quick_cli, tmp_path, lines, options, words, code):
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    done = quick_cli("finetune", DEMO, "train.jsonl", *options)
    assert done.returncode == code and words in done.stderr, done.stderr
    assert not [path for path in tmp_path.iterdir() if path.name != "train.jsonl"]


def test_a_single_row_is_trained_on_without_a_held_out_one(quick_cli, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps(LINES[0]))
    done = quick_cli("finetune", DEMO, "train.jsonl", "-o", "adapter", "--steps", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["before"], found["after"], found["samples"], len(found["losses"])) == (None, None, [], 1)


def test_without_a_model_or_data_there_is_an_example(quick_cli):
    for arguments in ((), (DEMO,)):
        done = quick_cli("finetune", *arguments)
        assert done.returncode == 2 and "qcli finetune SmolLM2-135M-nf4 train.jsonl" in done.stderr
