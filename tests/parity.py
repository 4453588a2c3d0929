"""When an implementation of an op agrees with its reference: the same bits where it quantizes, else within its roundings."""

import torch

from qcli.ops.dequantize_4bit import decoded_absmax, dequantize_4bit
from qcli.ops.dequantize_table import dequantize_table
from qcli.ops.linear_w8a16 import widened

# Of a result, of what is summed, and of a weight rounded to 16 bits, each half a unit in the last place.
ROUNDING = {torch.float32: 2.0**-19, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def flat(result) -> tuple[torch.Tensor, ...]:
    """The tensors of a result."""
    if result is None:
        return ()
    return result if isinstance(result, tuple) else (result,)


def written(name: str) -> list[str]:
    """The arguments that the op `name` changes."""
    schema = getattr(torch.ops.qcli, name).default._schema
    return [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]


def results(name: str, function, arguments: dict) -> tuple[torch.Tensor, ...]:
    """What an implementation of the op `name` returns, and then what it changes. It gets copies of that."""
    given = arguments | {key: arguments[key].clone() for key in written(name) if arguments[key] is not None}
    returned = flat(function(**given))
    return *returned, *(given[key] for key in written(name) if given[key] is not None)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For comparing NaN with NaN, and +0 with -0 apart."""
    return torch.atleast_1d(tensor.contiguous()).view(torch.uint8) if tensor.numel() else tensor


def disagreement(name: str, arguments: dict, ours, expected) -> str | None:
    """What is wrong with the result `ours` of the op `name`; `expected` is the reference's."""
    for number, (a, b) in enumerate(zip(flat(ours), flat(expected), strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {number} is {a.dtype} {tuple(a.shape)}, expected {b.dtype} {tuple(b.shape)}"
        wrong = ~_agrees(name, arguments, a.cpu(), b.cpu())
        if wrong.any():
            place = wrong.nonzero()[0].tolist()
            found, wanted = (t.cpu()[tuple(place)].item() if t.dim() else t.item() for t in (a, b))
            where = f"{int(wrong.sum())} of {wrong.numel()} places, first {place}"
            return f"result {number} differs at {where}: {found}, expected {wanted}"
    return None


def _largest(*tensors: torch.Tensor | None) -> float:
    """The product of the largest finite magnitudes."""
    product = 1.0
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            product *= tensor.float().nan_to_num(0, 0, 0).abs().amax().item()
    return product


# Ops of a decoding step: what the terms of a result may be as large as, apart from the result.
_STEPS = {
    "activate": lambda given: _largest(given["gate"], given["up"]),
    "attend": lambda given: _largest(given["values"], given["value_scales"]),
    "norm": lambda given: 4 + _largest(given["bias"]),
}


def _agrees(name: str, arguments: dict, ours: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    if "quantize" in name or name in ("fit_scale", "fit_table", "gptq_columns", "rope_append", "round_to_grid"):
        same = bits(ours) == bits(expected)
        same = same.view(*ours.shape, -1).all(-1) if ours.numel() else same
        return same | (ours.isnan() & expected.isnan())  # whose bits are the device's own affair
    if name == "activation_stats":
        bound = 1e-12 * expected.abs()
        magnitudes = arguments["x"].cpu().double().abs().flatten(0, -2)
        for row, power in ((2, 1), (4, 3)):  # sums whose terms cancel
            bound[row] += 1e-15 * magnitudes.pow(power).sum(0)
        return ((ours - expected).abs() <= bound) | (ours == expected) | (ours.isnan() & expected.isnan())
    if name in _STEPS:
        bound = ROUNDING[ours.dtype] * expected.float().abs() + ROUNDING[torch.float32] * _STEPS[name](arguments)
        return ((ours.float() - expected.float()).abs() <= bound) | ~(expected.isfinite() | ours.isfinite())
    if name == "add_sparse":
        terms = _largest(arguments["x"], arguments["values"]) * arguments["x"].shape[-1] + _largest(arguments["y"])
        return (ours.float() - expected.float()).abs() <= ROUNDING[ours.dtype] * expected.float().abs() + 2.0**-20 * terms
    given = arguments["x"].dtype
    rounding = ROUNDING[computed := arguments.get("compute_dtype", given)]
    bound = rounding * (_magnitude(name, arguments) + expected.float().abs()) + 1e-6
    if given != computed:  # rounded once more
        bound += ROUNDING[given] * expected.float().abs()
    # Infinity times a weight of zero is NaN, and which of a weight's factors is applied first may differ.
    spoiled = ~expected.isfinite() & ~ours.isfinite()
    return ((ours.float() - expected.float()).abs() <= bound) | spoiled


def _magnitude(name: str, arguments: dict) -> torch.Tensor:
    """Per element of a product the sum of its terms' magnitudes."""
    given = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}
    x = given["x"].float()
    if name == "linear_4bit":
        absmax = decoded_absmax(given["absmax"], given["nested_absmax"], given["offset"], given["quant_type"])
        of_block = given["block_size"], given["quant_type"], [given["out_features"], x.shape[-1]]
        weight = dequantize_4bit(given["packed"], absmax, *of_block, torch.float32).abs()
        if given.get("zero_point") is not None:  # it takes its share of sums apart from that of the codes
            of_zero = (absmax * given["zero_point"].abs() / 8).repeat_interleave(given["block_size"])
            weight = weight + 2 * of_zero.view(weight.shape)
    elif name == "linear_table":
        sizes = given["bits"], given["block_size"], given["out_features"], x.shape[-1]
        tensors, zero_point = (given["packed"], given["table"].abs(), given["absmax"]), given["zero_point"]
        taken = None if zero_point is None else -zero_point.abs()  # as with linear_4bit
        weight = dequantize_table(*tensors, taken, *sizes, torch.float32)
    else:
        scale = given["scale"].float()
        scale = scale if scale.dim() == 2 else scale.unsqueeze(1) / 127
        weight = widened(given["weight"], scale, given.get("group_size") or max(1, x.shape[-1]), given.get("zero_point"))
    return x.abs() @ weight.abs().t()
