"""Against a hub on loopback: planning by ranged reads, lost connections, streaming, gates, upload."""

import hashlib
import json

import pytest
import torch
import transformers

import qcli
from tests.hub_server import COMMIT, running_hub
from tests.models import add_tokenizer

HEADER = 105_000  # bytes: more than planning asks for, less than a shard


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="250KB")
    add_tokenizer(folder)
    return folder


@pytest.fixture
def hub(model):
    with running_hub() as server:
        server.add_repo("org/tiny", model)
        yield server


@pytest.fixture
def here(hub, tmp_path, monkeypatch):
    """The hub of this process, with an empty cache."""
    hub.serve_this_process(monkeypatch, tmp_path / "home")
    return hub


@pytest.fixture
def expected(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    qcli.quantize(str(model), out)
    return out


def weights(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}


def shards(model) -> list[str]:
    return sorted(p.name for p in model.glob("*.safetensors"))


def test_a_dry_run_reads_headers_only(hub, model, cli, tmp_path):
    done = cli("quantize", "org/tiny", "--dry-run", "--json", env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert len(plan["tensors"]) == 21 and plan["output"] == "tiny-nf4"
    for shard in shards(model):
        ranged = [r for r in hub.requests if r[0] == "GET" and r[1].endswith(shard)]
        assert len(ranged) == 1 and 0 < hub.sent(shard) <= 100_000
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_hub_without_ranges_is_not_downloaded(hub, model, cli, tmp_path):
    hub.without_ranges.add("org/tiny")
    done = cli("info", "org/tiny", env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert f"org/tiny: LlamaForCausalLM at {COMMIT}" in done.stdout and "whole by their headers" in done.stdout


def test_quantize_generate_and_offline(here, model, expected, cli, quick_cli, tmp_path):
    done = quick_cli("quantize", "org/tiny", "--json")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)
    made = json.loads((tmp_path / "tiny-nf4/qcli.json").read_text())
    assert made["source"]["name"] == "org/tiny" and made["source"]["revision"] == COMMIT
    assert "base_model: org/tiny" in (tmp_path / "tiny-nf4/README.md").read_text()
    downloaded = sum(here.sent(s) for s in shards(model))
    again = quick_cli("quantize", "org/tiny", "-o", "again", "--json")
    assert again.returncode == 0, again.stderr
    assert sum(here.sent(s) for s in shards(model)) == downloaded  # from the cache, headers too
    offline = cli("quantize", "org/tiny", "-o", "offline", "--json", env={"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    assert weights(tmp_path / "offline") == weights(expected)
    text = quick_cli("generate", "org/tiny", "ab", "--max-new-tokens", "3", "--json")
    assert text.returncode == 0 and len(json.loads(text.stdout)["token_ids"]) == 3


def test_stream_keeps_no_shard(here, model, expected, quick_cli, tmp_path):
    done = quick_cli("quantize", "org/tiny", "--stream", "--json")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "tiny-nf4.partial").exists() and not (tmp_path / "tiny-nf4/.qcli").exists()


def test_stream_never_deletes_from_the_users_cache(here, model, quick_cli, tmp_path):
    assert quick_cli("quantize", "org/tiny", "--json").returncode == 0
    cached = sorted(p.name for p in (tmp_path / "home").rglob("*.safetensors"))
    assert cached == shards(model)
    assert quick_cli("quantize", "org/tiny", "--stream", "-o", "two", "--json").returncode == 0
    assert sorted(p.name for p in (tmp_path / "home").rglob("*.safetensors")) == cached


def test_a_connection_cut_in_the_middle_is_tried_again(here, model, expected, quick_cli, tmp_path):
    here.cut(shards(model)[1], after=HEADER, times=2)
    done = quick_cli("quantize", "org/tiny", "--json")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)


def test_a_connection_lost_for_good_says_so_and_a_rerun_goes_on(here, model, expected, quick_cli, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between tries, of qcli and of huggingface_hub
    plan = quick_cli("quantize", "org/tiny", "--dry-run")
    assert plan.returncode == 0
    last = shards(model)[-1]
    here.cut(last, after=HEADER, times=1000)
    done = quick_cli("quantize", "org/tiny", "--json")
    assert done.returncode == 1 and "the connection to the hub was lost" in done.stderr
    assert "run the same command again" in done.stderr and not (tmp_path / "tiny-nf4").exists()
    first = here.sent(shards(model)[0])
    here.cuts.clear()
    done = quick_cli("quantize", "org/tiny", "--json")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)
    assert here.sent(shards(model)[0]) == first


def test_refusals(here, model, quick_cli, tmp_path, monkeypatch):
    here.add_repo("org/gated", model, gated=True)
    for arguments, message in (
        (("org/nothing",), "the hub knows no model org/nothing"),
        (("org/gated",), "org/gated is gated"),
        (("org/tiny", "--revision", "v9"), "org/tiny has no revision v9"),
    ):
        done = quick_cli("quantize", *arguments, "-o", "out")
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 2 and not (tmp_path / "out").exists()
    here.serve_this_process(monkeypatch, tmp_path / "empty")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = quick_cli("info", "org/tiny")
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr


def test_push_to_hub(here, model, quick_cli, tmp_path, monkeypatch):
    done = quick_cli("quantize", str(model), "-o", "out", "--push-to-hub", "me/tiny-nf4")
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {here.url}/me/tiny-nf4" in done.stdout
    uploaded = here.uploads["me/tiny-nf4"]
    assert uploaded == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    card = uploaded["README.md"].decode()
    for part in ("nf4 (block_size 64, double_quant true)", "bits per weight", "| q_proj |", " dB |"):
        assert part in card
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused = quick_cli("quantize", str(model), "-o", "two", "--push-to-hub", "me/x")
    assert refused.returncode == 1 and "hf auth login" in refused.stderr and not (tmp_path / "two").exists()


def test_bin_on_the_hub(here, model, quick_cli, tmp_path, expected):
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "bins"
    shutil.copytree(model, folder)
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    here.add_repo("org/bins", folder)
    done = quick_cli("quantize", "org/bins", "-o", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").stat().st_size == (expected / "model.safetensors").stat().st_size
