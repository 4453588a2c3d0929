import pytest

from qcli.checkpoint import source as pieces
from qcli.checkpoint.source import open_source, read_pieces
from qcli.errors import CheckpointError
from tests.models import make_model


class Counting:
    """Stands for a source whose bytes are their place; knows how far ahead it was asked."""

    def __init__(self, fails_at=None):
        self.asked, self.fails_at = [], fails_at

    def read(self, file, offset, count):
        self.asked.append(offset)
        if offset == self.fails_at:
            raise CheckpointError("no more")
        return bytes([offset] * count)


def test_pieces_come_in_order_and_few_are_asked_for_ahead():
    source = Counting()
    for i, piece in enumerate(read_pieces(source, ((f"file {i}", i, 1 + i % 3) for i in range(100)))):
        assert piece == bytes([i] * (1 + i % 3))
        assert len(source.asked) <= i + 1 + pieces._AHEAD
    assert sorted(source.asked) == list(range(100))


def test_a_failure_is_raised_at_its_piece():
    source, got = Counting(fails_at=7), []
    with pytest.raises(CheckpointError, match="no more"):
        for piece in read_pieces(source, (("file", i, 1) for i in range(100))):
            got.append(piece)
    assert got == [bytes([i]) for i in range(7)] and max(source.asked) <= 7 + pieces._AHEAD


def test_a_file_that_ends_too_early(tmp_path):
    make_model("llama", tmp_path)
    source, path = open_source(str(tmp_path)), tmp_path / "model.safetensors"
    size = path.stat().st_size
    assert source.read("model.safetensors", size - 10, 10) == path.read_bytes()[-10:]
    with pytest.raises(CheckpointError, match="ended at byte .*, 2 too early"):
        source.read("model.safetensors", size - 10, 12)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot read .*model.safetensors: No such file"):
        source.read("model.safetensors", 0, 12)
