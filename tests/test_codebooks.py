import subprocess
import sys
from bisect import bisect_left

import bitsandbytes.functional
import numpy as np
import pytest
import torch

from qcli import codebooks


def neighbours(values: np.ndarray) -> np.ndarray:
    """The values, and the float32 on either side of each."""
    values = values.astype(np.float32)
    return np.concatenate([np.nextafter(values, np.float32(-2)), values, np.nextafter(values, np.float32(2))])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codes_are_those_of_bitsandbytes(quant_type):
    theirs = bitsandbytes.functional.get_4bit_type(quant_type, device="cpu")
    assert codebooks.CODEBOOKS[quant_type].dtype == np.float32
    assert np.array_equal(codebooks.CODEBOOKS[quant_type], theirs.numpy())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_order_ascends(quant_type):
    order = codebooks.ORDER[quant_type]
    assert sorted(order) == list(range(16))
    assert (np.diff(codebooks.CODEBOOKS[quant_type][order]) >= 0).all()
    assert (np.diff(codebooks.THRESHOLDS[quant_type]) > 0).all()


def test_lines_of_the_dynamic_map():
    """As a kernel reads them, against bitsandbytes' map."""
    theirs = bitsandbytes.functional.create_dynamic_map().numpy().astype(np.float64)
    x = np.float32(4) * (np.arange(256, dtype=np.float32) - 127)
    starts, slopes = codebooks.DYNAMIC_LINES[:, x.view(np.int32) >> 23 & 15].astype(np.float64)
    values = np.sign(x) * starts + slopes * x
    assert (np.abs(values - theirs) <= 2.0**-20 * np.abs(theirs)).all()


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_code_is_zero(quant_type):
    assert codebooks.CODEBOOKS[quant_type][codebooks.ZERO_CODE[quant_type]] == 0


def test_nf4_thresholds_are_the_literals_of_the_cuda_kernel():
    literals = [
        -0.8480964004993439,
        -0.6106329262256622,
        -0.4599952697753906,
        -0.33967941999435425,
        -0.23460740596055984,
        -0.13791173323988914,
        -0.045525018125772476,
        0.03979014977812767,
        0.1202552504837513,
        0.2035212516784668,
        0.2920137718319893,
        0.3893125355243683,
        0.5016634166240692,
        0.6427869200706482,
        0.8614784181118011,
    ]
    assert np.array_equal(codebooks.THRESHOLDS["nf4"], np.array(literals, dtype=np.float32))


def test_fp4_thresholds_are_on_the_magnitude():
    """Each decision, at and beside every threshold and zero, is that of |v| > t followed by the sign of v."""
    literals = np.array([0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333], np.float32)
    magnitudes = [0b000, 0b001, 0b110, 0b111, 0b100, 0b101, 0b010, 0b011]
    for v in neighbours(np.concatenate([literals, -literals, np.float32([0, -0.0, 1, -1])])):
        expected = magnitudes[int((abs(v) > literals).sum())] | (8 if v < 0 else 0)
        found = codebooks.ORDER["fp4"][int((v > codebooks.THRESHOLDS["fp4"]).sum())]
        assert found == expected, v


def test_dynamic_map_is_that_of_bitsandbytes():
    theirs = bitsandbytes.functional.create_dynamic_map()
    assert codebooks.DYNAMIC_MAP.dtype == np.float32
    assert torch.equal(torch.from_numpy(codebooks.DYNAMIC_MAP), theirs)


def test_dynamic_thresholds_decide_as_exact_midpoints():
    exact = [(float(a) + float(b)) / 2 for a, b in zip(codebooks.DYNAMIC_MAP[:-1], codebooks.DYNAMIC_MAP[1:])]
    points = neighbours(np.array(exact))
    found = np.searchsorted(codebooks.DYNAMIC_THRESHOLDS, points)
    assert found.tolist() == [bisect_left(exact, float(v)) for v in points]


def test_tables_need_no_torch():
    code = "import sys, qcli.codebooks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("bits, table", [(3, codebooks.NF3), (4, codebooks.NF4)])
def test_normal_floats_are_quantiles_of_the_normal_distribution(bits, table):
    """The construction of NF4 (QLoRA, appendix E; bitsandbytes' create_normal_map) in float64, with `bits` in the place of 4."""
    half = 2 ** (bits - 1)
    offset = 1 - (1 / (2 * 2**bits) + 1 / (2 * (2**bits - 1))) / 2
    quantiles = [torch.special.ndtri(torch.linspace(offset, 0.5, n + 1, dtype=torch.float64)[:-1]) for n in (half, half - 1)]
    values = torch.cat((quantiles[0], torch.zeros(1, dtype=torch.float64), -quantiles[1])).sort().values
    np.testing.assert_allclose(table, (values / values.max()).numpy(), rtol=0, atol=2e-7)
    if bits == 3:
        assert np.array_equal(table, (values / values.max()).float().numpy())
