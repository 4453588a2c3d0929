"""The modules call a CPU kernel without the op around it where they may; the op is what they are compared with."""

import copy
import io

import pytest
import torch

from qcli.nn.linear_4bit import Linear4bit
from qcli.nn.linear_8bit import Linear8bit
from qcli.ops.linear_4bit import linear_4bit
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.linear_w8a16 import linear_w8a16
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.ops.quantize_absmax import mean_absmax, quantize_absmax
from qcli.ops.quantize_int8 import quantize_int8
from qcli.runtime import cpu

BUILT = pytest.mark.skipif(not cpu.variants(), reason="installed without a compiler")
IN, OUT = 256, 24


def four_bit(seed=0, bias=True, nested=True):
    generator = torch.Generator().manual_seed(seed)
    packed, absmax = quantize_4bit(torch.randn(OUT, IN, generator=generator), 64, "nf4")
    tensors, offset = {"weight": packed, "weight_absmax": absmax}, None
    if nested:
        offset = mean_absmax(absmax)
        tensors["weight_absmax"], tensors["weight_nested_absmax"] = quantize_absmax(absmax, offset)
    module = Linear4bit(
        IN,
        OUT,
        bias,
        tensors=tensors,
        quant_type="nf4",
        block_size=64,
        nested_offset=offset,
        compute_dtype=torch.bfloat16,
        dtype=torch.bfloat16,
    )
    if bias:
        module.bias.data.normal_(generator=generator)
    return module


def eight_bit(seed=0, bias=True):
    generator = torch.Generator().manual_seed(seed)
    q, scale, _ = quantize_int8(torch.randn(OUT, IN, generator=generator), 0.0)
    module = Linear8bit(IN, OUT, bias, tensors={"weight": q, "SCB": scale}, threshold=6.0, dtype=torch.bfloat16)
    if bias:
        module.bias.data.normal_(generator=generator)
    return module


def by_op(module, x):
    op = linear_4bit if isinstance(module, Linear4bit) else linear_int8
    return op(x, *module._arguments())


def inputs(tokens=1):
    x = torch.randn(1, tokens, IN, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    x[..., 3] *= 20
    return x


MAKERS = [four_bit, eight_bit]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 17, 40])
def test_a_module_gives_what_its_op_gives(make, bias, tokens):
    module, x = make(bias=bias), inputs(tokens)
    with torch.no_grad():
        expected = by_op(module, x)
        for _ in range(2):
            assert torch.equal(module(x), expected)
        assert torch.equal(module(x.transpose(1, 2).contiguous().transpose(1, 2)), expected)


@BUILT
@pytest.mark.parametrize("make", MAKERS)
def test_it_is_prepared_once(make):
    module = make()
    with torch.no_grad():
        module(inputs())
        prepared = module._prepared
        module(inputs(3))
    assert prepared is not None and module._prepared is prepared


@pytest.mark.parametrize("make", MAKERS)
def test_tensors_that_are_replaced_or_changed_are_noticed(make):
    module, other, x = make(0), make(1), inputs()
    with torch.no_grad():
        module(x)
        names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
        for name in names:
            replaced = getattr(other, name)
            if name == "weight":
                module.weight.data = replaced.data  # as libraries do behind a module's back
            else:
                setattr(module, name, replaced)
            assert torch.equal(module(x), by_op(module, x)), name
        if make is four_bit:
            module.nested_offset = other.nested_offset
        assert torch.equal(module(x), by_op(other, x))
        module.bias.zero_()
        assert torch.equal(module(x), by_op(module, x))
        module.load_state_dict(make(2).state_dict())
        assert torch.equal(module(x), by_op(module, x))


@pytest.mark.parametrize(
    "make, name, value",
    [(eight_bit, "threshold", 0.5), (four_bit, "compute_dtype", torch.float32), (four_bit, "nested_offset", 3.0)],
)
def test_a_setting_that_changes_is_noticed(make, name, value):
    module, x = make(), inputs().float()
    with torch.no_grad():
        before = module(x)
        setattr(module, name, value)
        assert torch.equal(module(x), by_op(module, x)) and not torch.equal(module(x), before)


def test_what_had_to_be_copied_is_not_kept():
    """A weight that is not contiguous, scales that are not float32: changes in place reach the next call."""
    module, x = eight_bit(), inputs()
    module.weight.data = module.weight.data.t().contiguous().t()
    module.SCB = module.SCB.double()
    with torch.no_grad():
        module(x)
        module.weight.data.mul_(-1)
        module.SCB.mul_(2)
        assert torch.equal(module(x), by_op(module, x))


@pytest.mark.parametrize("make", MAKERS)
def test_copies_and_moves_start_afresh(make):
    module, x = make(), inputs()
    with torch.no_grad():
        expected = module(x)
        twin = copy.deepcopy(module)
        assert twin._prepared is None
        twin.weight.data.zero_()
        assert torch.equal(module(x), expected) and not torch.equal(twin(x), expected)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
        assert module.to("cpu")._prepared is None
        assert torch.equal(module(x), expected)


@BUILT
def test_what_records_a_call_sees_the_op():
    module, x = four_bit(), inputs()
    assert not cpu.plain(x)  # autograd is on
    with torch.no_grad():
        assert cpu.plain(x) and not cpu.plain(torch.nn.Parameter(x)) and not cpu.plain(x.to("meta"))
        with cpu.using(None):
            assert not cpu.plain(x)
        expected = module(x)
        graph = torch.fx.experimental.proxy_tensor.make_fx(module)(x)
        assert "qcli.linear_4bit" in graph.code and torch.equal(graph(x), expected)
        traced = torch.jit.trace(module, x)
        assert "qcli::linear_4bit" in str(traced.graph) and torch.equal(traced(x), expected)
        exported = torch.export.export(module, (x,))
        assert "qcli.linear_4bit" in exported.graph_module.code and torch.equal(exported.module()(x), expected)


@BUILT
def test_transforms_and_modes_see_the_op():
    module, x = four_bit(), inputs()
    with torch.no_grad():
        expected = module(x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            module(x)
        assert "qcli::linear_4bit" in {event.key for event in profile.key_averages()}
        assert torch.equal(torch.func.vmap(module)(x), expected)
        assert torch.equal(module(torch._neg_view(x)), module(-x))


@BUILT
def test_a_weight_that_is_elsewhere_is_refused():
    module = four_bit()
    module.weight_absmax = module.weight_absmax.to("meta")
    with torch.no_grad(), pytest.raises(ValueError, match="absmax is on meta, expected cpu"):
        module(inputs())


def test_an_input_of_the_wrong_width_is_refused():
    for make in MAKERS:
        for width in (IN * 2, IN // 2):
            for tokens in (1, 40):
                with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
                    make()(torch.ones(tokens, width))


def test_whole_activations_go_to_the_op_for_them():
    module, x = eight_bit(), inputs()
    with torch.no_grad():
        before = module(x)
        module.rounds_activations = False
        assert torch.equal(module(x), linear_w8a16(x, module.weight, module.SCB, module.bias))
        assert not torch.equal(module(x), before) and "rounds_activations=False" in repr(module)
        module.rounds_activations = True
        assert torch.equal(module(x), before)
