"""The only module that prints. Results are written to stdout, messages to stderr. `--json` writes one object to stdout."""

import json as _json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager

from qcli.progress import WorkerShown


def out(text: str = "", end: str = "\n") -> None:
    """Writes result text to stdout unchanged and at once. A character that the encoding lacks becomes a question mark."""
    if not can_show(text):
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)
    sys.stdout.write(text + end)
    sys.stdout.flush()


def json(value: object) -> None:
    """Writes one JSON document to stdout."""
    out(_json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def ask(prompt: str) -> str | None:
    """A line from stdin, after a prompt on stderr. None at the end of stdin."""
    sys.stderr.write(prompt)
    sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def say(text: str = "") -> None:
    """Writes a message line to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def warn(text: str) -> None:
    """Writes a warning to stderr."""
    _styled(f"warning: {text}", "yellow")


def error(message: str, hint: str | None = None) -> None:
    """Writes an error and what to do about it to stderr."""
    _styled(f"error: {message}", "bold red")
    if hint:
        say(f"  {hint}")


def _styled(text: str, style: str) -> None:
    if not sys.stderr.isatty():
        say(text)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(text, style))


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: Sequence[int] = (0,), talk: bool = False
) -> None:
    """Prints a table on stdout (stderr when `talk`). Columns whose index is in `left` are left-aligned, the others right.

    Cells are never cut: if the output is not a terminal, the table is as wide as necessary.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = sys.stderr if talk else sys.stdout
    shown = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, title_style="bold")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i in left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*[Text(str(cell)) for cell in row])
    width = None
    if not stream.isatty():
        width = Console(file=stream, width=10_000).measure(shown).maximum
    Console(file=stream, width=width, highlight=False).print(shown)
    stream.flush()


def can_show(text: str) -> bool:
    """Whether stdout's encoding has every character of `text`."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def bar(label: str, parts: Sequence[tuple[float, str, str]], whole: float, note: str, *, cells: int = 48) -> None:
    """Writes one stacked bar on stdout. `parts` are (amount, character, colour), in the unit of `whole`, the full length. If the
    parts exceed `whole`, a "|" marks its end."""
    used = sum(amount for amount, _, _ in parts)
    scale = (cells - (used > whole)) / max(whole, used, 1)
    pieces, reached, drawn = [], 0.0, 0
    for amount, character, colour in parts:
        reached += amount
        count = round(reached * scale) - drawn
        drawn += count
        pieces.append((character * count, colour))
    if used > whole:
        pieces = _cut(pieces, round(whole * scale))
    else:
        pieces.append((("\u00b7" if can_show("\u00b7") else ".") * (cells - drawn), "dim"))
    line = [(f"{label} ", ""), *pieces, (f"  {note}", "")]
    if not sys.stdout.isatty():
        out("".join(text for text, _ in line))
        return
    from rich.console import Console
    from rich.text import Text

    Console(highlight=False, soft_wrap=True).print(Text.assemble(*line))
    sys.stdout.flush()


def _cut(pieces: list[tuple[str, str]], at: int) -> list[tuple[str, str]]:
    """`pieces` with a mark after the first `at` characters."""
    marked = []
    for text, colour in pieces:
        here = 0 <= at <= len(text) and not any(mark == "|" for mark, _ in marked)
        marked += [(text[:at], colour), ("|", "bold red"), (text[at:], colour)] if here else [(text, colour)]
        at -= len(text)
    return marked


def marked(parts: Sequence[tuple[str, bool]], *, talk: bool = False) -> None:
    """Writes texts one after another, those that are marked in green, or between brackets where there is no colour. They go to
    stderr when `talk`, else to stdout."""
    stream = sys.stderr if talk else sys.stdout
    if stream.isatty():
        from rich.console import Console
        from rich.text import Text

        text = Text.assemble(*((text, "green" if is_marked else "dim") for text, is_marked in parts))
        Console(file=stream, highlight=False, soft_wrap=True).print(text)
        return
    plain = "".join(f"[[{text}]]" if is_marked else text for text, is_marked in parts)
    say(plain) if talk else out(plain)


class Progress:
    """Progress of a run counted in source bytes: one live line on a terminal, else a plain line every few seconds. On a cluster a
    line for each worker follows it."""

    PLAIN_SECONDS = 5.0
    LIVE_SECONDS = 0.1
    WORKERS = 12  # lines for workers, at most: the slow ones come first then

    def amount(self, count: float) -> str:
        """`count` in words."""
        from qcli.sizes import format_bytes

        return format_bytes(count)

    def __init__(self, total: int, done: int = 0):
        self.total, self.done, self.first = total, done, done
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.printed = False
        self.of_workers: list[WorkerShown] = []

    def advance(self, count: int, name: str) -> None:
        """Adds `count` source bytes, read for the tensor `name`."""
        self.done += count
        now = time.monotonic()
        if now - self.shown < (self.LIVE_SECONDS if self.live else self.PLAIN_SECONDS):
            return
        self.shown = now
        self._show(name, now)

    def workers(self, found: Sequence[WorkerShown]) -> None:
        """Sets what each worker of a cluster does."""
        self.of_workers = list(found)

    def _show(self, name: str, now: float) -> None:
        from qcli.sizes import format_seconds

        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        left = format_seconds((self.total - self.done) / rate) if rate > 0 else "?"
        percent = 100 * self.done / max(self.total, 1)
        name = "" if self.of_workers else name
        line = f"{percent:5.1f}%  {self.amount(self.done)} of {self.amount(self.total)}  {self.amount(rate)}/s  {left} left  {name}"
        lines = [line.rstrip(), *self._worker_lines()]
        if self.live:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns
            back = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
            sys.stderr.write("\r\x1b[J" + "\n".join(each[: columns - 1] for each in lines) + back)
            sys.stderr.flush()
        else:
            say("\n".join(lines))
        self.printed = True

    def _worker_lines(self) -> list[str]:
        found = sorted(self.of_workers, key=lambda each: not each.slow) if len(self.of_workers) > self.WORKERS else self.of_workers
        lines = [
            f"        {each.host}  {self.amount(each.rate)}/s{', slow' if each.slow else ''}  {each.doing}"
            for each in found[: self.WORKERS]
        ]
        return lines + [f"        and {len(found) - self.WORKERS:,} more"] * (len(found) > self.WORKERS)

    def close(self) -> None:
        """Ends the live line."""
        if self.live and self.printed:
            sys.stderr.write("\r\x1b[J")
            sys.stderr.flush()


class TokenProgress(Progress):
    """Progress of a run counted in tokens."""

    def amount(self, count: float) -> str:
        """`count` in words."""
        return f"{count:,.0f} tokens"


@contextmanager
def token_progress(total: int, done: int = 0):
    """A `TokenProgress` over `total` tokens. An earlier run has finished `done` of them."""
    shown = TokenProgress(total, done)
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def progress(total: int, done: int = 0):
    """A `Progress` over `total` source bytes. An earlier run has finished `done` of them."""
    shown = Progress(total, done)
    try:
        yield shown
    finally:
        shown.close()
