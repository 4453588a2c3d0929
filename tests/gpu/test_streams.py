"""Several streams, threads and devices at once give the same bits again."""

import threading

import pytest
import torch

from qcli.ops.linear_4bit import linear_4bit
from qcli.ops.linear_int8 import linear_int8
from qcli.ops.linear_w8a16 import linear_w8a16
from qcli.ops.quantize_4bit import quantize_4bit
from qcli.runtime import cuda
from tests.gpu.checks import KERNELS, WAYS, kernel, moved, same_bits, wrong
from tests.gpu.inputs import hostile, layer_4bit, layer_8bit, w8a16

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error::qcli.errors.QcliWarning")]

N, K = 4096, 4096
ROUNDS = 50
LONG = 20_000_000  # clock cycles, about 10 ms: a missing wait then shows unfinished results


def work(device: torch.device) -> list:
    """Calls of every kind of product, with known results."""
    four = [layer_4bit(tokens, N, K, torch.bfloat16, device=device) for tokens in (1, 8, 32, 100)]
    eight = [layer_8bit(tokens, N, K, torch.bfloat16, outliers=9, device=device) for tokens in (1, 8, 100)]
    calls = [lambda a=a: linear_4bit(**a) for a in four] + [lambda a=a: linear_int8(**a) for a in eight]
    few, many = w8a16(eight[1]), four[3]["x"]
    return [*calls, lambda: linear_w8a16(**few), lambda: quantize_4bit(many, 64, "nf4")]


@pytest.mark.parametrize("name, product", WAYS, indirect=["product"])
def test_the_same_bits_every_time(name, device, product):
    for case, arguments in hostile(name, (torch.bfloat16,)):
        arguments = moved(arguments, device)
        first = kernel(name, arguments)
        assert all(same_bits(kernel(name, arguments), first) for _ in range(ROUNDS)), case


def test_large_products_give_the_same_bits_every_time(device):
    for call in work(device):
        first = call()
        assert all(same_bits(call(), first) for _ in range(ROUNDS))


def test_two_streams_at_once(device):
    calls = work(device)
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    streams, found = [cuda.capture_stream(device), torch.cuda.Stream(device)], [[], []]
    for _ in range(10):
        for stream, results, mine in zip(streams, found, (calls, calls[::-1])):
            with torch.cuda.stream(stream):
                results.append([call() for call in mine])
    torch.cuda.synchronize()
    for results, wanted in zip(found, (expected, expected[::-1])):
        assert all(same_bits(a, b) for result in results for a, b in zip(result, wanted))


@pytest.mark.parametrize("kind", ["default", "of PyCUDA", "foreign"])
def test_a_kernel_keeps_to_the_order_of_its_stream(kind, device):
    """The kernel reads what a long task before it on the stream wrote, and a copy after it reads the kernel's result."""
    makers = {"default": torch.cuda.default_stream, "of PyCUDA": cuda.capture_stream, "foreign": torch.cuda.Stream}
    stream = makers[kind](device)
    arguments = layer_4bit(8, 28672, 8192, torch.bfloat16, device=device)
    late = torch.randn_like(arguments["x"])
    expected = linear_4bit(**arguments | {"x": late})
    torch.cuda.synchronize()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        copy = torch.full_like(expected, torch.nan)
        torch.cuda._sleep(LONG)
        arguments["x"].copy_(late)
        copy.copy_(linear_4bit(**arguments))
        arguments["x"].zero_()  # must happen after the kernel has read it
    torch.cuda.synchronize()
    assert same_bits(copy, expected)


def test_two_threads_at_once(device):
    calls = work(device)
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    problems, start = [], threading.Barrier(3)

    def run(stream_of):
        try:
            with torch.cuda.stream(stream_of(device)):
                start.wait(timeout=60)
                for _ in range(10):
                    for i, call in enumerate(calls):
                        result = call()
                        torch.cuda.current_stream(device).synchronize()
                        if not same_bits(result, expected[i]):
                            problems.append(f"call {i} on {stream_of.__name__}")
        except BaseException as e:
            problems.append(repr(e))
            raise

    kinds = (torch.cuda.default_stream, cuda.capture_stream, torch.cuda.Stream)
    threads = [threading.Thread(target=run, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_every_device(device):
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip("needs several GPUs")
    for index in reversed(range(count)):  # only the last of them is the current one
        for name in KERNELS:
            for case, arguments in hostile(name, (torch.bfloat16,)):
                assert wrong(name, arguments, torch.device("cuda", index)) is None, (index, name, case)
