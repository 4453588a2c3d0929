"""What the model writes for a few held-out prompts, greedily, before and after training."""

import warnings
from collections.abc import Sequence

from torch import nn

from qcli.errors import QcliWarning
from qcli.finetuning.encoding import Row
from qcli.generation.decode import Decoding
from qcli.generation.sampling import Sampling

SAMPLES, NEW_TOKENS, _OF_A_TEXT = 3, 48, 16


def prompts_of(rows: Sequence[Row]) -> list[list[int]]:
    """Token ids up to where a row is learnt; of a text its first few tokens."""
    found = []
    for row in rows[:SAMPLES]:
        first = int(row.trained.argmax())
        found.append(row.ids[: first if first > 1 else min(_OF_A_TEXT, max(len(row) - 1, 1))].tolist())
    return found


def continued(model: nn.Module, tokenizer, prompts: Sequence[list[int]]) -> list[str]:
    """The model's continuation of each prompt. Its modules are those that `generate` runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QcliWarning)  # `qcli generate` says what is odd about the model's rules
        decoding = Decoding(model, tokenizer, Sampling(max_new_tokens=NEW_TOKENS, temperature=0))
        found = [decoding.generate(ids, lambda token: None).token_ids for ids in prompts]
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
