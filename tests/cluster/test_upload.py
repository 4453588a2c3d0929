"""`quantize --cluster --push-to-hub`: the machines upload what they write, and nobody meets a part of it. And what they read of a
model on the hub."""

import pytest

import qcli
from qcli.checkpoint.hub import joined
from qcli.checkpoint.hub_upload import Branch
from qcli.errors import CheckpointError
from tests.hub_server import running_hub
from tests.models import add_tokenizer, make_model

SETTINGS = {"max_shard_size": "25kB"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with running_hub() as found:
        found.large_files = True
        found.serve_this_process(monkeypatch, tmp_path / "home")
        yield found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    make_model("llama", folder / "model", max_shard_size="80kB")
    add_tokenizer(folder / "model")
    qcli.quantize(str(folder / "model"), folder / "out", settings=SETTINGS)
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_branch_is_published_in_one_commit(hub, whole):
    """As several machines fill it, one of which is overtaken twice."""
    out, branch = whole / "out", Branch("me/tiny", "qcli-test")
    weights = {p.name: p.stat().st_size for p in out.glob("*.safetensors")}
    branch.make()
    branch.make()
    hub.overtaken = 2
    for name in sorted(weights)[:-1]:
        branch.add(out / name)
    rest = [name for name in files(out) if name not in weights]
    with pytest.raises(CheckpointError, match=f"has 0 bytes on the branch qcli-test of .*, expected {weights[max(weights)]:,}"):
        branch.publish(weights, out, rest)
    assert hub.uploads["me/tiny"] == {} and branch.sizes(weights).keys() == set(sorted(weights)[:-1])
    branch.add(out / max(weights))
    assert branch.sizes(weights) == weights
    before = len([r for r in hub.requests if r[1].endswith("/commit/main")])
    assert branch.publish(weights, out, rest) == f"{hub.url}/me/tiny"
    assert hub.uploads["me/tiny"] == files(out) and not hub.branches
    assert len([r for r in hub.requests if r[1].endswith("/commit/main")]) == before + 1


@pytest.mark.parametrize(
    "parts, expected",
    [
        ([], []),
        ([(0, 5), (5, 9)], [(0, 9)]),
        ([(60_000, 80_000), (0, 9)], [(0, 80_000)]),  # nearly touching: one request
        ([(0, 9), (1_000_000, 1_000_001), (3, 20)], [(0, 20), (1_000_000, 1_000_001)]),
    ],
)
def test_parts_that_touch_are_one_request(parts, expected):
    assert joined(parts) == expected


@pytest.mark.slow
def test_workers_upload_and_read_only_what_they_need(hub, whole, tmp_path, monkeypatch):
    """The cluster begins after the hub's address is in the environment, which its workers take over."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    hub.add_repo("org/model", whole / "model")
    monkeypatch.chdir(tmp_path)
    report = qcli.quantize("org/model", "out", settings=SETTINGS, cluster="local", workers=2, push_to_hub="me/there")
    there, here = hub.uploads["me/there"], files(whole / "out")
    assert there.keys() == here.keys() and not hub.branches
    weights = [name for name in here if name.endswith(".safetensors")]
    assert len(weights) >= 5 and all(there[name] == here[name] for name in weights)
    assert report.url == f"{hub.url}/me/there" and report.output == "me/there"
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    sizes = {p.name: p.stat().st_size for p in (whole / "model").glob("*.safetensors")}
    sent = sum(hub.sent(name) for name in sizes) / sum(sizes.values())
    assert sent < 3 + 1.2  # three of them read the headers, which of files so small is the whole, and each part is read once
