"""The CUDA kernels of products on the emulator, tested as in test_kernels.py."""

import pytest

from tests.emulator.emulator import missing
from tests.emulator.test_kernels import REACHED, check

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")


@pytest.mark.parametrize("name", [name for name in REACHED if name.startswith("linear")])
def test_kernels_agree_with_the_reference(name, emulated):
    check(name, emulated)
