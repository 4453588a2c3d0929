"""All rows of a run: what is trained on and what is held out, with everything that was cut or left out counted.

Nothing is cut in silence. A row longer than --max-tokens is an error unless --too-long says what to do with it; a plain text, which
has no end that must be kept whole, is split.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from qcli.errors import UsageError
from qcli.finetuning.encoding import Encoding, Row
from qcli.finetuning.examples import TEXT, Example, files_of, read_examples

TOO_LONG = ("error", "cut", "split", "drop")
HELD_OUT, MOST_HELD_OUT, _FEW = Fraction(1, 20), 500, 8  # share and number of rows; with fewer than that, none


@dataclass
class Counts:
    """What became of the examples of a file. `dropped` are sentences, one for each row that is left out. `cut` rows lost
    `lost_tokens`; `split` rows became more than one."""

    examples: int = 0
    cut: int = 0
    lost_tokens: int = 0
    split: int = 0
    dropped: list[str] = field(default_factory=list)


@dataclass
class Rows:
    """`train` and `held_out` rows of `form`, and what became of the examples."""

    form: str
    train: list[Row]
    held_out: list[Row]
    counts: Counts
    encoding: Encoding

    @property
    def tokens(self) -> int:
        """Of the rows to train on."""
        return sum(map(len, self.train))

    @property
    def trained(self) -> int:
        """Tokens of them that are learnt."""
        return sum(row.count for row in self.train)


def read_rows(
    tokenizer,
    label: str,
    data: str | Path,
    *,
    held_out: str | Path | Fraction | None,
    max_tokens: int,
    too_long: str | None,
    loss: str | None,
    ends: Sequence[int],
    seed: int,
) -> Rows:
    """The rows of a file or folder. `held_out` is a file, a share of the rows, or None: the folder's own file, else HELD_OUT.

    Raises UsageError: for what cannot be read or is too long, and where no token would be learnt.
    """
    train_file, valid_file = files_of(data)
    if isinstance(held_out, str | Path):
        valid_file = files_of(held_out)[0]
    examples = read_examples(train_file)
    form = examples[0].form
    encoding = Encoding(tokenizer, label, form, loss, ends)
    counts = Counts()
    train = _rows(examples, encoding, max_tokens, too_long, counts)
    if not train:
        reason = f": {counts.dropped[0]}" if counts.dropped else ""
        raise UsageError(f"{train_file} has no token to learn{reason}", "Give examples with a completion.")
    if valid_file is not None and not isinstance(held_out, Fraction):
        others = read_examples(valid_file)
        if others[0].form != form:
            raise UsageError(f"{valid_file} and {train_file} are of different forms: {others[0].form}, {form}", "Keep to one form.")
        kept = _rows(others, encoding, max_tokens, too_long, counts)
        if not kept:
            raise UsageError(f"{valid_file} has no token to learn", "Give examples with a completion.")
    else:
        train, kept = _divided(train, HELD_OUT if held_out is None else held_out, seed, held_out is not None)
    return Rows(form, train, kept, counts, encoding)


def _divided(rows: list[Row], share: Fraction, seed: int, asked: bool) -> tuple[list[Row], list[Row]]:
    """(the rows to train on, those held out), both in the order of the file."""
    count = min(round(len(rows) * share), len(rows) - 1) if asked else min(round(len(rows) * share), MOST_HELD_OUT)
    if share and not count and len(rows) >= _FEW:
        count = 1
    chosen = set(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]


def _rows(examples: Sequence[Example], encoding: Encoding, max_tokens: int, too_long: str | None, counts: Counts) -> list[Row]:
    found: list[Row] = []
    rule = too_long or ("split" if encoding.form == TEXT else "error")
    longer: list[Row] = []
    for example in examples:
        row = encoding.row(example)
        counts.examples += 1
        if not row.count:
            counts.dropped.append(f"{row.place}: no token to learn")
        elif len(row) <= max_tokens:
            found.append(row)
        elif rule == "error":
            longer.append(row)
        elif rule == "drop":
            counts.dropped.append(f"{row.place}: {len(row):,} tokens")
        else:
            found += _shortened(row, encoding, max_tokens, rule, counts)
    if longer:
        first, others = longer[0], f" and {len(longer) - 1:,} more are" if len(longer) > 1 else " is"
        raise UsageError(
            f"{first.place} ({len(first):,} tokens){others} longer than --max-tokens, which is {max_tokens:,}",
            f"The longest has {max(map(len, longer)):,}. Raise it, or choose --too-long cut, split or drop.",
        )
    return found


def _shortened(row: Row, encoding: Encoding, max_tokens: int, rule: str, counts: Counts) -> list[Row]:
    """The pieces of a row that is too long. Each piece of a text begins with what the tokenizer puts before a text."""
    if rule == "cut":
        counts.cut += 1
        counts.lost_tokens += len(row) - max_tokens
        pieces = [row.part(0, max_tokens)]
    else:
        counts.split += 1
        pieces = _pieces(row, encoding, max_tokens)
    kept = [piece for piece in pieces if piece.count]
    if not kept:
        counts.dropped.append(f"{row.place}: no token to learn within {max_tokens:,} tokens")
    return kept


def _pieces(row: Row, encoding: Encoding, max_tokens: int) -> list[Row]:
    prefix = len(encoding.prefix) if encoding.form == TEXT else 0
    pieces, start = [row.part(0, max_tokens)], max_tokens
    while start < len(row):
        stop = min(start + max_tokens - prefix, len(row))
        ids, trained = (np.concatenate((whole[:prefix], whole[start:stop])) for whole in (row.ids, row.trained))
        trained[:1] = False
        pieces.append(Row(ids, trained, row.place))
        start = stop
    return pieces
