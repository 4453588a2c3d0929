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


def test_quantize_generate_and_offline(hub, model, expected, cli, tmp_path):
    environment = hub.environment(tmp_path / "home")
    done = cli("quantize", "org/tiny", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)
    made = json.loads((tmp_path / "tiny-nf4/qcli.json").read_text())
    assert made["source"]["name"] == "org/tiny" and made["source"]["revision"] == COMMIT
    assert "base_model: org/tiny" in (tmp_path / "tiny-nf4/README.md").read_text()
    downloaded = sum(hub.sent(s) for s in shards(model))
    again = cli("quantize", "org/tiny", "-o", "again", "--json", env=environment)
    assert again.returncode == 0, again.stderr
    assert sum(hub.sent(s) for s in shards(model)) == downloaded  # from the cache, headers too
    offline = cli("quantize", "org/tiny", "-o", "offline", "--json", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0, offline.stderr
    assert weights(tmp_path / "offline") == weights(expected)
    text = cli("generate", "org/tiny", "ab", "--max-new-tokens", "3", "--json", env=environment)
    assert text.returncode == 0 and len(json.loads(text.stdout)["token_ids"]) == 3


def test_stream_keeps_no_shard(hub, model, expected, cli, tmp_path):
    environment = hub.environment(tmp_path / "home")
    done = cli("quantize", "org/tiny", "--stream", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "tiny-nf4.partial").exists() and not (tmp_path / "tiny-nf4/.qcli").exists()


def test_stream_never_deletes_from_the_users_cache(hub, model, cli, tmp_path):
    environment = hub.environment(tmp_path / "home")
    assert cli("quantize", "org/tiny", "--json", env=environment).returncode == 0
    cached = sorted(p.name for p in (tmp_path / "home").rglob("*.safetensors"))
    assert cached == shards(model)
    assert cli("quantize", "org/tiny", "--stream", "-o", "two", "--json", env=environment).returncode == 0
    assert sorted(p.name for p in (tmp_path / "home").rglob("*.safetensors")) == cached


def test_a_connection_cut_in_the_middle_is_tried_again(hub, model, expected, cli, tmp_path):
    hub.cut(shards(model)[1], after=HEADER, times=2)
    done = cli("quantize", "org/tiny", "--json", env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)


def test_a_connection_lost_for_good_says_so_and_a_rerun_goes_on(hub, model, expected, cli, tmp_path):
    environment = hub.environment(tmp_path / "home")
    plan = cli("quantize", "org/tiny", "--dry-run", env=environment)
    assert plan.returncode == 0
    last = shards(model)[-1]
    hub.cut(last, after=HEADER, times=1000)
    done = cli("quantize", "org/tiny", "--json", env=environment)
    assert done.returncode == 1 and "the connection to the hub was lost" in done.stderr
    assert "run the same command again" in done.stderr and not (tmp_path / "tiny-nf4").exists()
    first = hub.sent(shards(model)[0])
    hub.cuts.clear()
    done = cli("quantize", "org/tiny", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "tiny-nf4") == weights(expected)
    assert hub.sent(shards(model)[0]) == first


def test_refusals(hub, model, cli, tmp_path):
    hub.add_repo("org/gated", model, gated=True)
    environment = hub.environment(tmp_path / "home")
    for arguments, message in (
        (("org/nothing",), "the hub knows no model org/nothing"),
        (("org/gated",), "org/gated is gated"),
        (("org/tiny", "--revision", "v9"), "org/tiny has no revision v9"),
    ):
        done = cli("quantize", *arguments, "-o", "out", env=environment)
        assert done.returncode == 1 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 2 and not (tmp_path / "out").exists()
    done = cli("info", "org/tiny", env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")})
    assert done.returncode == 1 and "HF_HUB_OFFLINE" in done.stderr


def test_push_to_hub(hub, model, cli, tmp_path):
    environment = hub.environment(tmp_path / "home")
    done = cli("quantize", str(model), "-o", "out", "--push-to-hub", "me/tiny-nf4", env=environment)
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/me/tiny-nf4" in done.stdout
    uploaded = hub.uploads["me/tiny-nf4"]
    assert uploaded == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    card = uploaded["README.md"].decode()
    for part in ("nf4 (block_size 64, double_quant true)", "bits per weight", "| q_proj |", " dB |"):
        assert part in card
    refused = cli("quantize", str(model), "-o", "two", "--push-to-hub", "me/x", env=environment | {"HF_TOKEN": "hf_wrong"})
    assert refused.returncode == 1 and "hf auth login" in refused.stderr and not (tmp_path / "two").exists()


def test_bin_on_the_hub(model, cli, tmp_path, expected):
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
    with running_hub() as hub:
        hub.add_repo("org/bins", folder)
        done = cli("quantize", "org/bins", "-o", "out", "--json", env=hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").stat().st_size == (expected / "model.safetensors").stat().st_size
