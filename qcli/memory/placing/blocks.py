"""A model's parameters as the blocks that a device map places: each embedding, each layer, and the final norm with the head."""

from qcli.memory.costs.weights import ITEMSIZE, method_of, weights
from qcli.memory.model.opening import Model
from qcli.memory.placing.split import STACK_PREFIX, Block
from qcli.schemes import NAMED

_EMBEDDING, _ENCODER, _STACK, _HEAD = range(4)
_NAMES = ("embedding", "encoder layer {}", f"{STACK_PREFIX}{{}}", "head")


def blocks_of(model: Model, method: str, dtype: str, *, every_linear: bool = False) -> list[Block]:
    """The blocks in the order of the forward pass, without state. `every_linear` is the one of `weights`."""
    groups: dict[tuple[int, int], list] = {(_HEAD, 0): []}
    for parameter in model.parameters:
        stage, index = _place(parameter)
        if stage == _EMBEDDING:
            index = sum(key[0] == _EMBEDDING for key in groups)
        groups.setdefault((stage, index), []).append(parameter)
    found = []
    for stage, index in sorted(groups):
        held = groups[stage, index]
        found.append(
            Block(
                name=_NAMES[stage].format(index),
                weights=weights(held, method, dtype, every_linear=every_linear).total,
                counted=sum(_counted(parameter, method, dtype) for parameter in held),
                unquantized=sum(parameter.numel for parameter in held if not _is_quantized(parameter, method)),
                with_first=stage == _HEAD and model.config.tied_embeddings,
            )
        )
    return found


def _place(parameter) -> tuple[int, int]:
    if parameter.layer is None:
        return (_EMBEDDING if parameter.kind == "embedding" else _HEAD), 0
    return (_ENCODER if parameter.name.startswith("encoder.") else _STACK), parameter.layer


def _is_quantized(parameter, method: str) -> bool:
    return parameter.scheme is not None if method == "stored" else method_of(parameter, method) is not None


def _counted(parameter, method: str, dtype: str) -> int:
    if _is_quantized(parameter, method):
        if method == "stored":
            return parameter.stored
        # Without scales, as transformers counts.
        return NAMED[method_of(parameter, method)].parts(parameter.out_features, parameter.in_features)["codes"].nbytes
    return parameter.numel * ITEMSIZE[method if method in ITEMSIZE else dtype]
