"""The JSON beside a 4-bit weight of bitsandbytes."""

import json

from qcli.checkpoint.dtypes import TORCH_NAMES
from qcli.formats import Weight
from qcli.schemes import NESTED_BLOCK_SIZE, Scheme

# JSON ends at its closing brace, so blanks after it are free. They hold a place for the longest float there is, so that the length
# of the blob is known before the offset is.
_LONGEST_FLOAT = len("-2.2250738585072014e-308")


def quant_state(weight: Weight, scheme: Scheme, nested_offset: float | None) -> bytes:
    """The quant_state JSON of one weight."""
    shape = [weight.out_features, weight.in_features]
    state: dict[str, object] = {
        "quant_type": scheme.codebook,
        "blocksize": scheme.size,
        "dtype": TORCH_NAMES[weight.dtype],
        "shape": shape,
    }
    if not scheme.double_quant:
        return json.dumps(state).encode()
    state |= {"nested_blocksize": NESTED_BLOCK_SIZE, "nested_dtype": "float32", "nested_offset": nested_offset}
    text = json.dumps(state)
    return text.ljust(len(text) - len(json.dumps(nested_offset)) + _LONGEST_FLOAT).encode()
