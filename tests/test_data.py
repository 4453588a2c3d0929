"""The text that comes with the package: clean, varied, and of a size worth measuring on."""

import unicodedata
from collections import Counter
from pathlib import Path

import pytest

import qcli

CORPUS = Path(qcli.__file__).parent / "data" / "corpus.txt"


@pytest.fixture(scope="module")
def corpus() -> str:
    return CORPUS.read_bytes().decode()  # strict UTF-8, line ends as they are


def test_its_size_and_its_end(corpus):
    assert 50_000 <= len(corpus.encode()) <= 90_000
    assert corpus.endswith("\n") and not corpus.endswith("\n\n")


def test_it_has_no_control_or_invisible_characters(corpus):
    found = {f"U+{ord(c):04X}" for c in corpus if unicodedata.category(c)[0] == "C" and c not in "\n\t"}
    assert not found
    assert unicodedata.is_normalized("NFC", corpus)


def test_no_line_comes_twice(corpus):
    """Short lines, such as closing brackets, may."""
    lines = Counter(line for line in corpus.split("\n") if len(line) >= 40)
    assert [line for line, count in lines.items() if count > 1] == []


def test_pieces_do_not_share_their_phrases(corpus):
    """Eight words that come again far on would be remembered, not predicted. Within a piece, as in a log, they may."""
    words = corpus.lower().split()
    first: dict[tuple[str, ...], int] = {}
    for i in range(len(words) - 7):
        phrase = tuple(words[i : i + 8])
        assert i - first.setdefault(phrase, i) < 500, " ".join(phrase)


def test_every_8_kilobytes_mix_prose_with_short_lines(corpus):
    """A short run reads only the beginning: it too must meet paragraphs, and code, verse, tables or talk."""
    data = corpus.encode()
    for start in range(0, len(data) - 8000, 2000):
        lines = data[start : start + 8000].decode(errors="ignore").split("\n")[1:-1]
        assert sum(len(line) >= 300 for line in lines) >= 2, start
        assert sum(0 < len(line) < 80 for line in lines) >= 10, start


@pytest.mark.parametrize("script", ["LATIN", "CYRILLIC", "CJK UNIFIED", "HIRAGANA", "ARABIC", "DEVANAGARI"])
def test_it_is_written_in_several_scripts(corpus, script):
    assert sum(unicodedata.name(c, "").startswith(script) for c in set(corpus)) >= 20
