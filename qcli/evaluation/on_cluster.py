"""An evaluation divided over the machines of a cluster: each worker reads some of the text through the whole model.

The driver cuts the text into windows, and puts the scores of all workers in the order of the text. Windows that one machine reads
in one call stay together, so that each token's figures are what they are there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcli.cluster.engine import Engine
from qcli.cluster.jobs import Told
from qcli.cluster.pool import Pool, Task
from qcli.evaluation.models import Models, Scored, prepare, score
from qcli.evaluation.tokens import TokenScores
from qcli.progress import Progress, bar_of, shown
from qcli.streaming.corpus import Window
from qcli.streaming.dividing import divided

JOB = f"{__name__}:ScoringJob"


class ScoringJob:
    """On a worker: scores windows."""

    def __init__(self, spec: dict[str, Any]):
        self.models = prepare(**spec)

    def score(self, told: Told, windows: Sequence[Window], texts: Sequence[Window]) -> Scored:
        """See qcli.evaluation.models."""
        return score(self.models, windows, texts, told.advance)


def everywhere(name: str | None) -> str | None:
    """A model's name for other machines: a folder by its whole path."""
    return str(Path(name).absolute()) if name is not None and Path(name).is_dir() else name


@contextmanager
def pool(address: str | None, workers: int | None, model: str, options: dict[str, Any]) -> Iterator[Pool | None]:
    """The workers of the cluster at `address`, each with the models of `prepare(model, **options)`; None without an address."""
    if address is None:
        yield None
        return
    named = {key: everywhere(options[key]) for key in ("against", "adapter")}
    spec = {"model": everywhere(model), **options, **named}
    gpus = options["device"] != "cpu"
    with Engine(address) as engine, Pool(engine, JOB, spec, workers, gpus=gpus) as found:
        yield found


def score_on(
    pool: Pool | None, models: Models, windows: Sequence[Window], texts: Sequence[Window], progress: Progress | None
) -> Scored:
    """What `score` does, by the workers of a pool of ScoringJobs, if there is one. Raises what it raises, and ClusterError."""
    if pool is None:
        with shown(progress, models.work(windows)) as advance:
            return score(models, windows, texts, advance)
    powers = [worker.threads for worker in pool.meet()]
    parts = [part for part in divided(windows, powers, padded=not models.chosen) if part]
    shared = pool.share(tuple(texts))
    tasks = [
        Task("score", ([windows[i] for i in part], shared), models.work([windows[i] for i in part]), f"{len(part):,} windows, {n}")
        for n, part in enumerate(parts, 1)
    ]
    of_part = {task.name: part for task, part in zip(tasks, parts)}
    with bar_of(progress, sum(task.size for task in tasks)) as pool.bar:
        found = [(of_part[task.name], scored) for task, scored in pool.deal(tasks)]
    return _joined(sorted(found, key=lambda each: each[0]), windows)


def _joined(found: Sequence[tuple[list[int], Scored]], windows: Sequence[Window]) -> Scored:
    """The scores of parts of the windows, given by their numbers, in the order of the text."""
    counts = [window.scored for window in windows]
    scores = [TokenScores.placed([(part, s.scores[row]) for part, s in found], counts) for row in range(len(found[0][1].scores))]
    roundings = found[0][1].roundings
    for _, scored in found[1:]:
        for name, rounding in scored.roundings.items():
            roundings[name].merge(rounding)
    return Scored(scores, roundings, sum(scored.calls for _, scored in found))
