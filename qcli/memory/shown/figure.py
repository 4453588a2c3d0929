"""The estimate as one static figure: a stacked bar for each method on each GPU, with a mark at the GPU's memory."""

from pathlib import Path

from qcli.files import figure as figure_file
from qcli.memory.estimate import Estimate
from qcli.memory.shown.bars import bars

_COLOURS = ("#1b6db3", "#2b8257", "#c8781a", "#b4bdc5")
_BAR = 0.6  # inches that a bar takes


def draw(found: Estimate, path: Path) -> None:
    """Draws the bars to `path`, whose suffix names the format. Overhead is drawn at its most.

    Raises UsageError for another suffix, QcliError where matplotlib is not installed or the file cannot be written.
    """
    stacked = bars(found)
    with figure_file.figure(path, 12, 2.2 + _BAR * len(stacked)) as figure:
        panel = figure.subplots()
        for row, bar in enumerate(stacked):
            left = 0.0
            for (name, size), colour in zip(bar.parts.items(), _COLOURS):
                panel.barh(row, size / 1e9, left=left, height=0.65, color=colour, label=name if row == 0 else None)
                left += size / 1e9
            panel.annotate(f"{left:.1f}", (left, row), (4, 0), textcoords="offset points", va="center", fontsize=11)
            if bar.memory is not None:
                end = bar.memory / 1e9
                label = "the GPU's memory" if row == 0 else None
                panel.plot([end, end], [row - 0.42, row + 0.42], color="black", linewidth=2, label=label)
        panel.set_yticks(range(len(stacked)), [bar.label for bar in stacked])
        panel.invert_yaxis()
        panel.margins(x=0.08)
        panel.set_xlim(left=0)
        setting = found.setting
        use = f"training by {setting.train}" if setting.train else setting.runtime
        panel.set_xlabel("GB, overhead at its most")
        panel.set_title(
            f"Memory of {figure_file.printable(found.model.label)}: {setting.context:,} tokens, batch {setting.batch}, {use}",
            parse_math=False,  # a name may hold a dollar sign
        )
        panel.legend(frameon=False, fontsize=11, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.12 - 0.4 / len(stacked)))
