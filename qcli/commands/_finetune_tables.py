"""What `qcli finetune` shows: the plan, the result, a figure of the losses."""

import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from qcli import console
from qcli.files.figure import figure
from qcli.finetuning.encoding import Row
from qcli.finetuning.plan import Plan
from qcli.finetuning.result import Finetuned
from qcli.sizes import format_bytes, format_seconds

_FORMS = {"text": "text", "completion": "prompts with completions", "messages": "conversations"}
_SHOWN = 600  # characters of the first example


def speaks() -> bool:
    """Whether this process is the one that shows things, of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def show_plan(plan: Plan, talk: bool) -> None:
    """On stderr where a run follows (`talk`), else on stdout."""
    say: Callable[[str], None] = console.say if talk else console.out
    for line in _lines(plan):
        say(line)
    first = plan.rows.train[0]
    tokenizer = plan.skeleton.tokenizer
    say("the first example, with what is learnt of it marked:")
    console.marked(_parts(first, tokenizer), talk=talk)
    for note in plan.notes:
        say(f"note: {note}")


def _lines(plan: Plan) -> list[str]:
    rows, options, order = plan.rows, plan.options, plan.order
    counts, longest = rows.counts, max(map(len, rows.train))
    shortened = []
    if counts.cut:
        shortened.append(f"{counts.cut:,} cut, which loses {counts.lost_tokens:,} tokens")
    if counts.split:
        shortened.append(f"{counts.split:,} split")
    if counts.dropped:
        shortened.append(f"{len(counts.dropped):,} left out")
    found = [
        f"{plan.skeleton.source.label}: {counts.examples:,} examples ({_FORMS[rows.form]}), {len(rows.train):,} rows to train on, "
        f"{len(rows.held_out):,} held out" + (f"; {', '.join(shortened)}" if shortened else ""),
        f"tokens: {rows.tokens:,}, of which {rows.trained:,} are learnt; the longest row has {longest:,}",
        plan.trained.line(),
        f"steps: {plan.steps:,} of {min(options.batch, order.rows):,} rows, {plan.epochs:.3g} epochs; learning rate "
        f"{options.lr:g}, {options.rare.schedule}",
    ]
    if plan.memory_bytes is not None:
        parts = ", ".join(f"{part.name} {format_bytes(part.bytes)}" for part in plan.memory)
        free = f" of {format_bytes(plan.free)} that are free" if plan.free is not None else ""
        found.append(f"memory: about {format_bytes(plan.memory_bytes)}{free} ({parts})")
    return found


def _parts(row: Row, tokenizer) -> list[tuple[str, bool]]:
    """(text, whether it is learnt) of an example, one after another."""
    found, left = [], _SHOWN
    for learnt, group in groupby(zip(row.ids.tolist(), row.trained.tolist()), key=lambda pair: pair[1]):
        text = tokenizer.decode([i for i, _ in group], skip_special_tokens=False)
        found.append((text[:left] + ("..." if len(text) > left else ""), learnt))
        left -= len(text)
        if left <= 0:
            break
    return found


def show_result(result: Finetuned) -> None:
    """On stdout."""
    for prompt, before, after in result.samples:
        console.out(f"prompt: {_one_line(prompt)}\n  before: {_one_line(before)}\n  after:  {_one_line(after)}")
    loss = ""
    if result.before is not None and result.after is not None:
        kept = f", that of step {result.best:,}" if result.best != result.steps else ""
        loss = f"held-out loss {result.before:.4f} before, {result.after:.4f} after{kept}; "
    console.out(
        f"{result.output}: {loss}{result.parameters:,} parameters trained in {result.steps:,} steps, "
        f"{format_seconds(result.seconds)}, {result.tokens_per_second:,.0f} tokens/s, peak memory "
        f"{format_bytes(result.peak_memory)}; "
        f"{'the base' if result.train == 'adapters' else 'all else'} is unchanged (SHA-256 {result.base_hash[:12]})"
    )
    if result.next:
        console.out(f"next: {result.next}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def draw(result: Finetuned, path: Path) -> None:
    """The losses of all steps, and those of held-out rows."""
    with figure(path, 8, 4.5) as made:
        axes = made.add_subplot()
        axes.plot(
            [step for step, _, _ in result.losses], [loss for _, loss, _ in result.losses], color="#9aa0a6", label="trained on"
        )
        measured = [(step, loss) for step, _, loss in result.losses if loss is not None]
        if measured and result.before is not None:
            measured.insert(0, (0, result.before))
        if measured:
            axes.plot(*zip(*measured), color="#1a73e8", marker="o", markersize=4, label="held out")
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a token")
        axes.set_title(Path(result.output).name, loc="left")
        axes.legend(frameon=False)
