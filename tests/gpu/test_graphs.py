"""Forward paths are captured as CUDA graphs and replayed with other inputs. Nothing in them waits for the host."""

import warnings
from contextlib import contextmanager

import pytest
import torch

from qcli.ops.attend import attend
from qcli.ops.linear_4bit import linear_4bit
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.linear_w8a16 import linear_w8a16
from qcli.ops.rope_append import rope_append, tables
from qcli.runtime import cuda
from tests.gpu.checks import WAYS, kernel, moved, noting, same_bits
from tests.gpu.inputs import activations, cache, hostile, layer_4bit, layer_8bit, w8a16, with_fixed

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error::qcli.errors.QcliWarning")]

N, K = 1000, 2048


def captured(call, device: torch.device) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """(a graph of the call, the tensor that holds the result of each replay)."""
    stream, main = cuda.capture_stream(device), torch.cuda.current_stream(device)
    graph = torch.cuda.CUDAGraph()
    with noting() as launched:
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            call()  # loads the kernels: a capture must not load them
            call()
        main.wait_stream(stream)
        launched.clear()
        with torch.cuda.graph(graph, stream=stream):
            result = call()
        assert launched
    return graph, result


def replays(op, arguments: dict, inputs: list[torch.Tensor], device: torch.device) -> None:
    """Each input gives the same result in a replay as in a call."""
    x = arguments["x"]
    graph, result = captured(lambda: op(**arguments), device)
    for new in inputs:
        x.copy_(new)
        expected = op(**arguments)
        result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(result, expected) and not result.isnan().any()
    x.fill_(torch.nan)  # the replay must read its input, not the values at the capture
    graph.replay()
    torch.cuda.synchronize()
    assert result.isnan().all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 8, 32, 100])
def test_linear_4bit(tokens, nested, device):
    arguments = layer_4bit(tokens, N, K, torch.bfloat16, nested=nested, bias=torch.bfloat16, device=device)
    replays(linear_4bit, arguments, [torch.randn(tokens, K, device=device) for _ in range(3)], device)


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_linear_int8_with_other_outliers_each_time(tokens, device, product):
    arguments = layer_8bit(tokens, N, K, torch.bfloat16, outliers=3, bias=torch.float32, device=device)
    inputs = [activations(tokens, K, torch.bfloat16, count, device) for count in (0, 5, 300, K, 0, 17)]
    replays(linear_int8, arguments, inputs, device)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_linear_int8_with_fixed_columns(tokens, threshold, device, product):
    arguments = with_fixed(layer_8bit(tokens, N, K, torch.bfloat16, threshold=threshold, device=device), 24)
    inputs = [activations(tokens, K, torch.bfloat16, count, device) for count in (0, 5, 300)]
    replays(linear_int8, arguments, inputs, device)


@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_linear_w8a16(tokens, device):
    arguments = w8a16(layer_8bit(tokens, N, K, torch.float16, device=device))
    replays(linear_w8a16, arguments, [torch.randn(tokens, K, device=device) for _ in range(3)], device)


def test_a_chain_of_layers(device):
    """As in a model: each kernel reads the previous kernel's result, and the allocator reuses memory in between."""
    layers = [layer_4bit(1, K, K, torch.bfloat16, device=device) for _ in range(4)]
    ints = [layer_8bit(1, K, K, torch.bfloat16, device=device) for _ in range(4)]
    x = torch.randn(1, K, device=device).bfloat16()

    def call():
        y = x
        for four, eight in zip(layers, ints):
            y = linear_4bit(**four | {"x": y})
            y = linear_int8(**eight | {"x": y / y.float().std().bfloat16()})
            y = torch.nn.functional.rms_norm(y, (K,))
        return y

    graph, result = captured(call, device)
    for _ in range(3):
        x.copy_(torch.randn(1, K, device=device))
        expected = call()
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(result, expected) and result.isfinite().all()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
def test_one_graph_serves_every_position(stored, device):
    """The position is read from device memory."""
    heads, kv_heads, dim, tokens = 8, 2, 64, 3
    cos, sin = (table.to(device) for table in tables(600, dim, False))
    ours = cache(kv_heads, 600, dim, dim, stored, device)
    theirs = moved(ours, device)
    q, k, v = (torch.randn(tokens, count, dim, device=device).bfloat16() for count in (heads, kv_heads, kv_heads))
    start = torch.zeros((), dtype=torch.int64, device=device)

    def step(held):
        turned = q.clone()
        rope_append(turned, k, v, cos, sin, **held, start=start)
        return attend(turned, **held, sinks=None, start=start, scale=dim**-0.5)

    graph, result = captured(lambda: step(ours), device)
    for position in (0, 1, 37, 300, 597):
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape, device=device))
        start.fill_(position)
        expected = step(theirs)
        result.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(result, expected) and not result.isnan().any()


@contextmanager
def no_waits():
    """Makes torch raise when it waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_wait_is_noticed(device):
    with pytest.raises(RuntimeError, match="synchroniz"), no_waits():
        torch.ones(1, device=device).item()


@pytest.mark.parametrize("name, product", WAYS, indirect=["product"])
def test_no_forward_path_waits_for_the_host(name, device, product):
    every = (moved(arguments, device) for _, arguments in hostile(name, (torch.bfloat16, torch.float32)))
    some = [a for a in every if all(value.numel() for value in a.values() if isinstance(value, torch.Tensor))]
    for arguments in some:
        kernel(name, arguments)  # tables and kernels are loaded once
    torch.cuda.synchronize()
    with no_waits():
        for arguments in some:
            kernel(name, arguments)
