"""The text that a model is measured on, cut into windows of tokens.

Each document is tokenized once, without special tokens, and read in windows of `sequence_length` L tokens. A window begins with
what the tokenizer puts before a text: mostly BOS, with some tokenizers nothing. These tokens count among the L. With a stride S
below L, the first L - S tokens of every window but a document's first were scored in the window before. They only give context.
The first token of a window is never scored, since nothing precedes it. With BOS every token of the text is scored once. Without
BOS and with S = L, the first token of each window is not scored. Tokens that close a text (EOS) are left out.

Bytes are those of UTF-8. A token stands for the bytes from the end of the token before it to its own end, by the offsets of the
tokenizer. The last token of a document also stands for what follows it. So the bytes of all tokens add up to the document's size.
A character that several tokens share counts with the first. For a tokenizer without offsets (written in Python), the bytes are
spread evenly over a document's tokens.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qcli.errors import UsageError
from qcli.streaming.conversations import MESSAGES, Conversations

DEFAULT_TOKENS = 16_384
DEFAULT_SEQUENCE_LENGTH = 2048
BUNDLED = "bundled text"
_CHARACTERS = 8  # per token, more than the average
_SPARE = 256  # tokens


@dataclass(frozen=True)
class Window:
    """One sequence as the model reads it. `ids[:context]` are not scored; the others stand for `scored_bytes` bytes."""

    ids: tuple[int, ...]
    context: int
    scored_bytes: int

    @property
    def scored(self) -> int:
        """Tokens whose probability counts."""
        return len(self.ids) - self.context


@dataclass(frozen=True)
class Corpus:
    """Windows of a text, and how they were cut. Each begins with `prefix`, which is not a part of the text."""

    name: str
    windows: tuple[Window, ...]
    sequence_length: int
    stride: int
    prefix: tuple[int, ...]
    documents: int
    tokens: int  # of the text, each counted once, scored or not

    @property
    def bos(self) -> bool:
        """Whether windows begin with BOS, or with anything else that the tokenizer puts before a text."""
        return bool(self.prefix)

    @property
    def scored(self) -> int:
        """Tokens whose probability counts."""
        return sum(window.scored for window in self.windows)

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes of the text that the scored tokens stand for."""
        return sum(window.scored_bytes for window in self.windows)


def read_windows(
    tokenizer,
    text: str | Path | None = None,
    *,
    tokens: int | None = None,
    default_tokens: int = DEFAULT_TOKENS,
    sequence_length: int | None = None,
    stride: int | None = None,
    model_limit: int | None = None,
    passed_over: int = 0,
) -> Corpus:
    """The first `tokens` tokens of a text, in windows; with `passed_over` those that follow as many.

    `text` is the path of a file. A name that ends in .jsonl means JSON lines, each with a document as "text", or a conversation as
    "messages", which the tokenizer's chat template makes a document; any other file is one document. None is the text that comes
    with qcli. `tokens` None takes all tokens, up to `default_tokens`. The sequence length is at most `model_limit` (None: no
    limit); its default is 2048. The default stride is the sequence length.

    Raises UsageError for a file that cannot be read, a text with too little in it, and options out of range; CheckpointError for
    conversations without a chat template.
    """
    prefix = prefix_of(tokenizer)
    if model_limit is not None and model_limit <= 0:  # how some configs state that there is no limit
        model_limit = None
    if sequence_length is None:
        sequence_length = min(DEFAULT_SEQUENCE_LENGTH, model_limit or DEFAULT_SEQUENCE_LENGTH)
    stride = sequence_length if stride is None else stride
    _check_options(tokens, sequence_length, stride, model_limit, len(prefix))
    name = BUNDLED if text is None else Path(text).name
    limit = default_tokens if tokens is None else tokens
    windows, documents, read, kept = [], 0, 0, 0
    conversations = Conversations(tokenizer)
    for document in _documents(text, conversations):
        if read == limit:
            break
        ids, ends = _tokenize(tokenizer, document, limit - read + passed_over)
        if conversations.kind == MESSAGES:
            ids, ends = _without(prefix, ids, ends)
        if over := min(passed_over, len(ids)):
            passed_over, start = passed_over - over, ends[over - 1]
            ids, ends = ids[over:], [end - start for end in ends[over:]]
        cut = list(_cut(prefix, ids, ends, sequence_length, stride))
        read += len(ids)
        kept += sum(new for _, new in cut)
        documents += bool(cut)
        windows += [window for window, _ in cut]
    if read < 2 or not windows:
        raise UsageError(f"{name} holds {_count(read)}, too little to measure a model on", "Give a longer text.")
    if tokens is not None and read < tokens:
        raise UsageError(
            f"{name} holds {_count(read)}, and --tokens asks for {tokens:,}", f"Ask for {read:,}, or give a longer text."
        )
    return Corpus(name, tuple(windows), sequence_length, stride, prefix, documents, kept)


def _check_options(tokens: int | None, length: int, stride: int, model_limit: int | None, prefix: int) -> None:
    if tokens is not None and tokens < 2:
        raise UsageError(f"--tokens is {tokens:,}, expected 2 or more")
    if model_limit and length > model_limit:
        raise UsageError(
            f"--sequence-length is {length:,}, the model's context holds {model_limit:,} tokens", f"Use {model_limit:,} or fewer."
        )
    least = max(prefix, 1) + 1
    if length < least:
        raise UsageError(f"--sequence-length is {length:,}, expected {least} or more")
    if not 1 <= stride <= length:
        raise UsageError(
            f"--stride is {stride:,}, expected 1 to the sequence length, which is {length:,}",
            "Leave it out for windows that do not overlap.",
        )


def _count(tokens: int) -> str:
    return f"{tokens:,} token" + ("" if tokens == 1 else "s")


def _documents(text: str | Path | None, conversations: Conversations) -> Iterator[str]:
    """The documents of a file, one after another."""
    if text is None:
        yield files("qcli").joinpath("data", "corpus.txt").read_bytes().decode()
        return
    path = Path(text)
    try:
        with path.open("rb") as file:
            if path.suffix == ".jsonl":
                yield from (_document(path, i, line, conversations) for i, line in enumerate(file, 1) if line.strip())
            else:
                yield file.read().decode("utf-8-sig")
    except OSError as e:
        raise UsageError(f"cannot read the text from {path}: {e.strerror}", "Check --text.") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8: {e}", "Convert it first.") from None


def _document(path: Path, number: int, line: bytes, conversations: Conversations) -> str:
    place = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except UnicodeDecodeError as e:
        raise UsageError(f"{place} is not UTF-8: {e}", "Convert it first.") from None
    except ValueError as e:
        raise UsageError(f"{place} is not valid JSON: {e}", "Mend that line.") from None
    text = conversations.document(value, place)
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UsageError(f"{place}: the text has half a surrogate pair", "Mend that line.")
    return text


def _without(prefix: tuple[int, ...], ids: list[int], ends: list[int]) -> tuple[list[int], list[int]]:
    """A document's ids and ends without the prefix that its template wrote, since every window begins with it."""
    if not prefix or tuple(ids[: len(prefix)]) != prefix:
        return ids, ends
    start = ends[len(prefix) - 1]
    return ids[len(prefix) :], [end - start for end in ends[len(prefix) :]]


def prefix_of(tokenizer) -> tuple[int, ...]:
    """The ids that the tokenizer puts before every text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    return ()


def _encode_beginning(tokenizer, text: str, limit: int):
    """(beginning of a text with at least `limit` tokens, its encoding). So a large file takes no longer than the part that is read.
    There are some tokens to spare, since those next to the cut may differ from the tokens of the whole text."""
    size = _CHARACTERS * (limit + _SPARE)
    while True:
        part = text[:size]
        found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        if len(part) == len(text) or len(found["input_ids"]) >= limit + _SPARE:
            return part, found
        size *= 2


def _tokenize(tokenizer, text: str, limit: int) -> tuple[list[int], list[int]]:
    """(the first `limit` token ids of a document, for each the bytes of the document up to its end)."""
    text, found = _encode_beginning(tokenizer, text, limit)
    ids, size = found["input_ids"], len(text.encode())
    if not tokenizer.is_fast:
        return ids[:limit], [size * (i + 1) // len(ids) for i in range(min(len(ids), limit))]
    ends, characters, read = [], 0, 0
    for _, end in found["offset_mapping"][:limit]:
        read += len(text[characters:end].encode())
        characters = max(characters, end)
        ends.append(read)
    if ends and len(ids) <= limit:
        ends[-1] = size
    return ids[:limit], ends


def _cut(prefix: tuple[int, ...], ids: list[int], ends: list[int], length: int, stride: int) -> Iterator[tuple[Window, int]]:
    """The windows of one document, each with the number of its tokens that are in no earlier window."""
    done = 0
    while done < len(ids):
        old = min(done, max(length - stride - len(prefix), 0))
        new = min(length - len(prefix) - old, len(ids) - done)
        before = len(prefix) + old
        context = max(before, 1)
        first = done + context - before  # the first scored token
        if first < done + new:
            size = ends[done + new - 1] - (ends[first - 1] if first else 0)
            yield Window((*prefix, *ids[done - old : done + new]), context, size), new
        done += new
