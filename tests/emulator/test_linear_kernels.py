"""The CUDA kernels of products on the emulator, tested as in test_kernels.py, and which forms have none."""

import pytest
import torch

from qcli.ops import linear_4bit, linear_w8a16
from qcli.runtime import cuda
from tests.emulator.emulator import SHARED, missing
from tests.emulator.test_kernels import REACHED, check
from tests.gpu.groups import eight_bits, four_bits
from tests.gpu.images import Asking


@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("name", [name for name in REACHED if name.startswith("linear")])
def test_kernels_agree_with_the_reference(name, emulated):
    check(name, emulated)


def asked(op, arguments: dict) -> set[str]:
    """The files of the kernels that the op would run."""
    backend = Asking((9, 0), SHARED[9, 0])
    with cuda.using(backend):
        op._cuda(**arguments)
    return {source for source, *_ in backend.asked}


def test_4_bit_forms_without_a_kernel():
    zeros, nvfp4 = (four_bits(kind, 2, 4, 128, torch.bfloat16) for kind in ("int4-zeros", "nvfp4"))
    zero_point = torch.zeros(len(nvfp4["absmax"]), dtype=torch.int8)
    nested = {"absmax": torch.zeros(4, dtype=torch.uint8), "nested_absmax": torch.ones(1), "zero_point": None}
    assert asked(linear_4bit, zeros) == asked(linear_4bit, nvfp4) == {"linear_4bit"}
    for other in (
        zeros | {"quant_type": "e2m1"},  # a difference of other values may not be exact in 16 bits
        zeros | nested,
        zeros | {"compute_dtype": torch.float32},
        zeros | {"x": zeros["x"][:, :96], "absmax": zeros["absmax"][:3], "zero_point": zeros["zero_point"][:3]},
        nvfp4 | {"quant_type": "nf4"},
        nvfp4 | {"zero_point": zero_point},
        nvfp4 | {"absmax": nvfp4["absmax"].bfloat16(), "nested_absmax": None},
        nvfp4 | {"x": nvfp4["x"][:, :96], "out_features": 1, "packed": nvfp4["packed"][:48], "absmax": nvfp4["absmax"][:6]},
    ):
        assert "linear_4bit" not in asked(linear_4bit, other)


def test_8_bit_forms_without_a_kernel():
    zeros, e4m3 = (eight_bits(kind, 2, 4, 128, torch.bfloat16) for kind in ("int8-zeros", "e4m3"))
    assert asked(linear_w8a16, zeros) == asked(linear_w8a16, e4m3) == {"linear_w8a16"}
    for other in (
        e4m3 | {"zero_point": zeros["zero_point"]},
        zeros | {"x": zeros["x"].float()},
        zeros | {"x": zeros["x"].repeat(5, 1)},
        eight_bits("int8-of-32-zeros", 2, 4, 128, torch.bfloat16),
        eight_bits("int8-zeros", 2, 4, 120, torch.bfloat16),
    ):
        assert asked(linear_w8a16, other) == set()
    with pytest.raises(ValueError, match="zero points without groups"):
        linear_w8a16._cuda(**zeros | {"group_size": 0})
