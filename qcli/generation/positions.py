"""How long a text a model can read: where its positions end, and the length that it was made for.

Rotary positions and ALiBi have no end. A table of positions, learned or sinusoidal, ends with its last row.
A table is recognised in the model itself, by its name and its shape.
"""

import re

import torch

from qcli.errors import QcliError
from qcli.memory.model.config import ModelConfig

_POSITIONS = re.compile(r"wpe|(.*_)?(pos|position|positions)(_.*)?")


def ends(model) -> tuple[int | None, int | None]:
    """(the most positions of a prompt, the most positions of a text) of a transformers model; None where there is no end.

    Without an encoder the prompt is part of the text, so both are the same.
    """
    if not model.config.is_encoder_decoder:
        end = _end(_part(model, "decoder"))
        return end, end
    return _end(_part(model, "encoder")), _end(_part(model, "decoder"))


def made_for(model) -> int | None:
    """The longest text, in tokens, that the model was made for, as in `estimate-memory`. None where the config sets none."""
    try:
        return ModelConfig(model.config.to_dict(), "the config").max_context
    except QcliError:  # the estimator does not know the config, but the model runs
        return None


def _part(model, name: str):
    """The encoder or decoder of a model, without its image and audio encoders. The model itself where it has no such parts."""
    try:
        part = getattr(model, f"get_{name}")()
    except (AttributeError, NotImplementedError, TypeError):
        return model
    return part if isinstance(part, torch.nn.Module) else model


def _end(module) -> int | None:
    found = []
    for path, part in module.named_modules():
        if isinstance(part, torch.nn.Embedding) and _POSITIONS.fullmatch(path.rpartition(".")[2]):
            # OPT, BART and RoBERTa do not use the first rows. A module that makes a longer table when needed has no end.
            free = getattr(part, "offset", 0) if part.padding_idx is None else part.padding_idx + 1
            if not hasattr(part, "make_weight"):
                found.append(part.num_embeddings - free)
        # GPT-J, CodeGen and CTRL keep the table as a buffer. MPT makes its ALiBi table for max_seq_len positions.
        found += [
            tensor.shape[0]
            for name, tensor in part.named_buffers(recurse=False)
            if _POSITIONS.fullmatch(name) and tensor.is_floating_point() and tensor.dim() == 2
        ]
        if hasattr(part, "build_mpt_alibi_tensor"):
            found.append(part.config.max_seq_len)
    return min(found, default=None)
