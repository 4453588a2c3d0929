"""What a calibration will take, from headers and the size of its text: tokens, memory, operations. No torch.

Estimates from above. A token of a text is a byte or more. The hidden states of all tokens wait between two blocks, and those that
leave a block stand beside those that enter it; transformers keeps the ones that entered the model. Modules of one parent that are
equally wide are taken to read one input.
"""

from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from qcli.calibration.settings import PARALLEL
from qcli.errors import UsageError
from qcli.memory.model.config import ModelConfig
from qcli.methods.choosing import needs_of
from qcli.quantization.gradient_needs import block_of, default_tokens, fisher_works, gradient_memory, gradient_operations
from qcli.quantization.plan import Plan

_BYTES_A_TOKEN = 3
_STATES = 3  # of each token: as it entered the model, as it entered the block, as it leaves it
_ITEMSIZE = 4  # of hidden states and of a block that is computed in float32
_COPIES = 8  # float32 copies of the largest weight while it is rounded
_FACTORS = 4  # float64 copies of the largest Hessian
_PRODUCTS = 10  # floating-point operations of a weight and a channel: compensation, errors before and after, scales


@dataclass(frozen=True)
class CalibrationNeeds:
    """`tokens` at most; bytes of memory beyond what `Plan.working_memory` counts; floating-point operations for a third as many
    tokens as the text has bytes, which is nearer to what tokenizers make of it."""

    tokens: int
    memory: int
    operations: float


def calibration_needs(plan: Plan, threads: int) -> CalibrationNeeds:
    """See CalibrationNeeds. `threads` round weights at a time. Raises UsageError for a config without a hidden size."""
    assert plan.calibration is not None
    size = _text_size(plan)
    limit = plan.calibration.tokens or default_tokens(plan)
    tokens, likely = min(limit, size), min(limit, size // _BYTES_A_TOKEN)
    blocks: dict[str, int] = defaultdict(int)
    for work in plan.work:
        if block := block_of(work.info.name):
            blocks[block] += work.info.numel
    sites: dict[tuple[str, int], str] = {}
    largest_weight = largest_site = 0
    hidden = int(ModelConfig(plan.source.config, f"config.json of {plan.source.label}").hidden_size)
    gradients, operations = gradient_memory(plan, hidden, tokens, threads), gradient_operations(plan, likely)
    if len(fisher_works(plan)) == len(plan.calibrated):
        return CalibrationNeeds(tokens, gradients, operations)
    passes = 1 if plan.calibration.order == PARALLEL else 2
    operations += 2.0 * passes * sum(blocks.values()) * likely
    for work in plan.calibrated:
        if work.linear is None or work.method is None or needs_of(work.method) == "fisher":
            continue
        rows, columns = work.linear.out_features, work.linear.in_features
        sites[work.linear.module.rpartition(".")[0], columns] = work.info.name
        largest_weight, largest_site = max(largest_weight, rows * columns), max(largest_site, columns)
        operations += _PRODUCTS * rows * columns**2
    of_block: dict[str, int] = defaultdict(int)
    for (_, columns), name in sites.items():
        of_block[block_of(name) or name] += 4 * columns**2
        operations += columns**2 * likely
    memory = (
        _STATES * _ITEMSIZE * hidden * tokens
        + _ITEMSIZE * max(blocks.values(), default=0)
        + max(of_block.values(), default=0)
        + threads * (4 * _COPIES * largest_weight + 8 * _FACTORS * largest_site**2)
    )
    return CalibrationNeeds(tokens, max(memory, gradients), operations)


def _text_size(plan: Plan) -> int:
    assert plan.calibration is not None
    text = plan.calibration.text
    try:
        return Path(text).stat().st_size if text else len(files("qcli").joinpath("data", "corpus.txt").read_bytes())
    except OSError as e:
        raise UsageError(f"cannot read the text from {text}: {e.strerror}", "Check --text.") from e
