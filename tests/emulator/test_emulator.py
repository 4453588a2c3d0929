"""The emulator finds the faults that it should find, and multiplies as tensor cores do."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qcli.runtime import cuda
from tests.conftest import ROOT
from tests.emulator.emulator import ORDERS, Emulator, LaunchError, missing, sanitized

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def emulator(emulated):
    made = Emulator(emulated, sources=HERE)
    with cuda.using(made):
        yield made


def run(entry: str, *arguments, signature="p", threads=64, shared=0, grid=1):
    cuda.kernel("faulty", signature, entry)((), (grid,), threads, shared, *arguments)
    return arguments[-1]


def results(emulator, entry, **options):
    """The result of a kernel in each order."""
    found = {}
    for emulator.order in ORDERS:
        found[emulator.order] = run(entry, torch.zeros(64), **options)
    return found


def test_a_missing_barrier_shows_in_some_order(emulator):
    expected = torch.arange(1, 65).float() % 64
    assert all(torch.equal(out, expected) for out in results(emulator, "with_barrier").values())
    wrong = {order for order, out in results(emulator, "no_barrier").items() if not torch.equal(out, expected)}
    assert {"forward", "shuffled"} <= wrong


def test_a_warp_that_is_ahead_shows_in_some_order(emulator):
    expected = 2 * ((torch.arange(64) + 32) % 64).float() + 64  # the sum of both rounds
    assert any(not torch.equal(out, expected) for out in results(emulator, "writes_too_soon").values())


def test_a_copy_that_comes_early_shows(emulator):
    values = torch.arange(512).float()
    emulator.order = "reverse"
    out = run("copies_too_soon", values, torch.zeros(64), signature="pp", shared=1024)
    assert not torch.equal(out, 4 * ((torch.arange(64) + 32) % 64).float())


def test_shared_memory_ends_where_a_blocks_does(emulator):
    emulator.of = 8, 6
    with pytest.raises(LaunchError, match="101377 bytes of dynamic shared memory, a block has 101376"):
        run("with_barrier", torch.zeros(64), shared=101377)
    emulator.of = 9, 0
    run("with_barrier", torch.zeros(64), shared=101377)


@pytest.mark.parametrize(
    "entry, message",
    [
        (
            "divergent",
            r"faulty\.cu: divergent: divergent barrier in block \(0, 0, 0\): waiting from thread 0 at line \d+, "
            "and 24 of 64 threads have returned",
        ),
        ("two_barriers", r"threads meet at one barrier from lines \d+ and \d+"),
        ("divergent_shuffle", "divergent barrier"),
        ("part_of_a_warp", "a warp collective with mask 0000ffff, expected all 32 lanes"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_divergence_is_reported(emulator, entry, message, order):
    emulator.order = order
    with pytest.raises(LaunchError, match=message):
        run(entry, torch.zeros(64))


def test_shared_memory_begins_as_garbage(emulator):
    for out in results(emulator, "unset_shared", shared=256).values():
        assert out[0] == 6 and out[1:].isnan().all()


def test_copies_are_there_once_waited_for(emulator):
    for emulator.order in ORDERS:
        values = torch.arange(256).float()
        out = run("waited_for", values, torch.zeros(64), signature="pp", shared=1024)
        expected = torch.arange(64) * 4.0
        expected[3] = 0
        assert torch.equal(out, expected)
    for emulator.order in ("forward", "shuffled"):  # the orders with late copies
        assert run("not_waited_for", values, torch.zeros(64), signature="pp", shared=1024).isnan().all()


def test_arguments_must_be_the_kernels(emulator):
    with pytest.raises(LaunchError, match="packs 16 bytes of arguments, the kernel takes 8"):
        run("with_barrier", torch.zeros(64), torch.zeros(64), signature="pp")
    with pytest.raises(LaunchError, match="a block of 40 threads, expected whole warps"):
        run("with_barrier", torch.zeros(64), threads=40)
    with pytest.raises(LaunchError, match="a grid of 0 blocks of 64 threads"):
        run("with_barrier", torch.zeros(64), grid=0)


def test_tensor_core_products(emulator):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=generator).half() for n in (16, 8))
    for emulator.order in ORDERS:
        out = run("one_product", a, b, torch.zeros(16, 8), signature="ppp", threads=32)
        torch.testing.assert_close(out, a.float() @ b.float().t(), rtol=1e-5, atol=1e-5)
    a, b = (torch.randint(-128, 128, (n, 32), generator=generator, dtype=torch.int8) for n in (16, 8))
    for emulator.order in ORDERS:
        out = torch.zeros(16, 8, dtype=torch.int32)
        run("one_integer_product", a, b, out, signature="ppp", threads=32, shared=24 * 32)
        assert torch.equal(out, a.int() @ b.int().t())


CRASH = """
import sys, torch
from pathlib import Path
from qcli.runtime import cuda
from tests.emulator.emulator import Emulator
from tests.emulator.test_emulator import HERE, run
folder, entry, signature, shared, *numbers = sys.argv[1:]
arguments = [torch.zeros(64)] * signature.count("p") + [int(n) for n in numbers]
with cuda.using(Emulator(Path(folder), sanitize=True, sources=HERE)):
    run(entry, *arguments, signature=signature, shared=int(shared))
print("nothing found")
"""


@pytest.mark.parametrize(
    "arguments, report",
    [
        (("beyond_global", "pi", 0, 64), "AddressSanitizer: heap-buffer-overflow"),
        (("beyond_dynamic", "p", 256), "AddressSanitizer: heap-buffer-overflow"),
        (("beyond_static", "p", 0), "index 32 out of bounds"),
        (("misaligned", "pp", 0), "misaligned address"),
    ],
)
def test_sanitizers_see_what_a_kernel_does(arguments, report, emulated):
    command = [sys.executable, "-c", CRASH, str(emulated), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=sanitized(), capture_output=True, text=True)
    assert done.returncode != 0 and report in done.stderr and "faulty.cu" in done.stderr, done.stderr[-3000:]
