"""What the tests of models from elsewhere share: a model to change, and ways to look at results."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.models import add_tokenizer, make_model

WORDS = ["--max-new-tokens", "4", "--json"]


@pytest.fixture(name="template", scope="module")
def template_fixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "model"
    make_model("llama", folder)
    add_tokenizer(folder)
    return folder


@pytest.fixture(name="model")
def model_fixture(template, tmp_path):
    shutil.copytree(template, tmp_path / "model")
    return tmp_path / "model"


def edit(path, **fields):
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | fields))


def weights(folder):
    """Every tensor of a folder's safetensors files."""
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def same_weights(first, second):
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tokens(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["token_ids"]
