"""What a pass of gradients will take, from headers: memory and operations. No torch.

Estimates from above. Of each token the hidden states at every block wait for the gradients to come back. A batch that passes a
block with a graph keeps what its linear modules read and give, and their gradients. Logits are made in chunks.
"""

import re
from collections import defaultdict

from qcli.calibration.settings import DEFAULT_TOKENS, GRADIENT_TOKENS
from qcli.methods.choosing import needs_of, weighs_tokens
from qcli.quantization.plan import Plan, Work
from qcli.schemes import CHUNK_BYTES

_ITEMSIZE = 4  # of what is computed in float32
_KEPT = 3  # of the inputs and outputs of linear modules: as they are, their gradients, and what lies between modules
_BATCH_TOKENS = 2048
_BESIDE = 3  # of each token in memory: what leaves the last norm, the gradients before and after a block
_LOGITS = 4 * (64 << 20)  # bytes of a chunk: logits, two copies, a gradient
_COPIES = 4  # float32 copies of the largest weight while it is rounded
_TABLES = 128  # bytes an element while tables are made of a chunk
_PASSES = 8  # operations a weight and token: forward twice, gradients of inputs, their squares


def fisher_works(plan: Plan) -> list[Work]:
    """The work on weights whose methods need Fisher information."""
    return [work for work in plan.calibrated if work.method and needs_of(work.method) == "fisher"]


def weighing_works(plan: Plan) -> list[Work]:
    """The work on weights whose methods weigh tokens by gradients."""
    return [work for work in plan.calibrated if work.method and weighs_tokens(work.method)]


def default_tokens(plan: Plan) -> int:
    """How many tokens of a text are read where --tokens does not say."""
    return GRADIENT_TOKENS if fisher_works(plan) or weighing_works(plan) else DEFAULT_TOKENS


def block_of(name: str) -> str | None:
    """The block that a tensor's name begins with; None outside of any."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else None


def gradient_memory(plan: Plan, hidden: int, tokens: int, threads: int) -> tuple[int, int]:
    """Bytes beyond what `Plan.working_memory` counts, for a hidden size and tokens of a text, and how many of them are hidden
    states that may wait on the disk. 0 where nothing needs gradients."""
    works, weighing = fisher_works(plan), weighing_works(plan)
    if not works and not weighing:
        return 0, 0
    blocks: dict[str | None, int] = defaultdict(int)
    for work in plan.work:
        blocks[block_of(work.info.name)] += work.info.numel
    around = blocks.pop(None, 0)
    sums: dict[str | None, int] = defaultdict(int)
    features: dict[str | None, int] = defaultdict(int)
    for work in plan.quantized:
        assert work.linear is not None
        features[block_of(work.info.name)] += work.linear.out_features + work.linear.in_features
    for work in works:
        sums[block_of(work.info.name)] += work.info.numel
    kept = _KEPT * _ITEMSIZE * _BATCH_TOKENS * max(features.values(), default=0)
    largest = max((work.info.numel for work in works), default=0)
    states = _ITEMSIZE * hidden * tokens * (len(blocks) + 1)
    beside = _ITEMSIZE * tokens * (_BESIDE * hidden + len(weighing))
    in_block = _ITEMSIZE * (max(blocks.values(), default=0) + max(sums.values(), default=0))
    each = max(kept, _COPIES * _ITEMSIZE * largest + (_TABLES * CHUNK_BYTES if works else 0))
    return states + beside + max(in_block + threads * each, _ITEMSIZE * around + threads * _LOGITS), states


def gradient_operations(plan: Plan, tokens: int) -> float:
    """Floating-point operations for tokens of a text. 0 where nothing needs gradients."""
    if not fisher_works(plan) and not weighing_works(plan):
        return 0.0
    return float(_PASSES) * sum(work.info.numel for work in plan.work) * tokens
