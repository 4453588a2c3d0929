"""What holds for every op: it is found, its fake agrees with its reference, it can be traced and compiled."""

from importlib import import_module
from itertools import islice

import pytest
import torch

from qcli import ops
from tests.parity import flat, results, written

NAMES = [
    "activate",
    "activation_stats",
    "add_sparse",
    "attend",
    "dequantize_4bit",
    "dequantize_absmax",
    "dequantize_int8",
    "dequantize_table",
    "error_4bit",
    "error_int8",
    "fit_scale",
    "fit_table",
    "gptq_columns",
    "hqq_terms",
    "linear_4bit",
    "linear_float",
    "linear_int8",
    "linear_table",
    "linear_w8a16",
    "norm",
    "pack_codes",
    "quantize_4bit",
    "quantize_absmax",
    "quantize_int8",
    "rope_append",
    "round_floats",
    "round_integers",
    "round_to_grid",
    "round_to_table",
]


def cases(name):
    return list(import_module(f"qcli.ops.{name}").cases())


def overload(name):
    import_module(f"qcli.ops.{name}")
    return getattr(torch.ops.qcli, name).default


def same_metadata(real, fake):
    real, fake = flat(real), flat(fake)
    return [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in fake]


def test_names_are_the_files_of_the_folder():
    assert ops.names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_case_names_are_unique_and_inputs_stay_as_the_schema_says(name):
    module = import_module(f"qcli.ops.{name}")
    listed = cases(name)
    assert len({case for case, _ in listed}) == len(listed) >= 8
    for case, arguments in listed:
        kept = [key for key, value in arguments.items() if isinstance(value, torch.Tensor) and key not in written(name)]
        tensors = {key: arguments[key].clone() for key in kept}
        getattr(module, name)(**arguments)
        for key, before in tensors.items():
            torch.testing.assert_close(arguments[key], before, rtol=0, atol=0, equal_nan=True, msg=f"{case}: {key}")


@pytest.mark.parametrize("name", NAMES)
def test_fake_has_the_shapes_of_the_reference(name):
    for case, arguments in cases(name):
        meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        assert same_metadata(overload(name)(**arguments), overload(name)(**meta)), case


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    for _, arguments in islice(cases(name), 1, None, 9):
        if not any(isinstance(a, torch.Tensor) and a.dtype in NO_ARITHMETIC for a in arguments.values()):
            torch.library.opcheck(overload(name), (), arguments)


# opcheck multiplies what it is given, to see whether it changes; torch does not multiply these.
NO_ARITHMETIC = (torch.float8_e4m3fn, torch.float8_e8m0fnu)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_graph_breaks(name):
    _, arguments = cases(name)[1]
    function = getattr(import_module(f"qcli.ops.{name}"), name)
    with torch.compiler.set_stance("default"), torch.no_grad():
        torch.compiler.reset()
        compile = lambda **given: torch.compile(lambda: function(**given), fullgraph=True, backend="aot_eager")()  # noqa: E731
        compiled = results(name, compile, arguments)
    torch.testing.assert_close(compiled, results(name, function, arguments), rtol=0, atol=0)
