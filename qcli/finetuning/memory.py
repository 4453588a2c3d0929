"""What a run needs, by the numbers of `qcli estimate-memory`, and what there is."""

from qcli.finetuning.batches import batches_of
from qcli.finetuning.plan import Plan
from qcli.loading.out_of_memory import free_memory
from qcli.loading.room import costs_of
from qcli.memory.components import Component
from qcli.methods.choosing import methods_of
from qcli.process import available_memory


def estimated(plan: Plan) -> tuple[list[Component], int | None]:
    """(the components of the estimate, the bytes that are free). No components where the estimate does not know the model."""
    gpus = plan.placement.gpus()
    free = free_memory(gpus)[gpus[0]][0] if gpus else available_memory()
    wanted = methods_of(plan.recipe)[0].scheme.name if plan.recipe else None
    costs = costs_of(plan.skeleton.source, wanted, plan.dtype)
    if costs is None:
        return [], free
    try:
        return plan.trained.memory(costs, most_tokens(plan), plan.checkpointing, bool(gpus)), free
    except (ArithmeticError, LookupError, TypeError, ValueError):  # a config that says nothing of its layers
        return [], free


def most_tokens(plan: Plan) -> int:
    """The tokens of the largest batch that passes the model."""
    rows, options = [*plan.rows.train, *plan.rows.held_out], plan.options
    longest = sorted(rows, key=len)[-(options.rare.sequences_at_a_time or options.batch) :]
    return max(batch.ids.numel() for batch in batches_of(longest, False, *options.at_a_time(longest)))
