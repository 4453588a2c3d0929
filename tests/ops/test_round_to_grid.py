"""round_to_grid against the nearest of all values by brute force, and what it refuses. Bit-equality: test_kernels.py."""

import pytest
import torch

from qcli import codebooks
from qcli.ops.gptq_columns import gptq_columns
from qcli.ops.round_to_grid import cases, round_to_grid

VALUES = {"nf4": codebooks.NF4, "nf3": codebooks.NF3, "e2m1": codebooks.E2M1}


@pytest.mark.parametrize("codebook, bits", [("", 2), ("", 4), ("nf4", 4), ("nf3", 3), ("e2m1", 4)])
def test_it_is_the_nearest_value(codebook, bits):
    w = torch.randn(7, 50, generator=torch.Generator().manual_seed(bits))
    scale = torch.rand(7, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    _, found = round_to_grid(w, scale, None, 16, codebook, bits, torch.float32)
    values = torch.from_numpy(VALUES[codebook]) if codebook else torch.arange(-(2 ** (bits - 1)), 2.0 ** (bits - 1))
    spread = scale.repeat_interleave(16, 1)[:, :50].double()
    distance = (w.double().unsqueeze(2) - values.double() * spread.unsqueeze(2)).abs()
    torch.testing.assert_close((w.double() - found.double()).abs(), distance.amin(2), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("codebook", ["", "nf4", "fp4", "nf3", "e4m3", "e2m1"])
def test_gptq_without_correlations_rounds_alike(codebook):
    """Columns one by one, each with the scales of its group."""
    w, scale = (torch.randn(9, n, generator=torch.Generator().manual_seed(n)) for n in (40, 3))
    scale = scale.abs() + 0.05
    groups = (torch.arange(40) // 16).int()
    of_columns = gptq_columns(w.t().contiguous(), torch.eye(40), scale.t().contiguous(), None, groups, codebook, 4, torch.bfloat16)
    for ours, theirs in zip(round_to_grid(w, scale, None, 16, codebook, 4, torch.bfloat16), of_columns):
        assert torch.equal(ours.float(), theirs.t().float())


def test_groups_of_one_column_and_of_a_row():
    w = torch.randn(5, 37, generator=torch.Generator().manual_seed(1))
    _, rows = round_to_grid(w, torch.full((5, 1), 0.5), None, 37, "", 8, torch.float32)
    _, ones = round_to_grid(w, torch.full((5, 37), 0.5), None, 1, "", 8, torch.float32)
    assert torch.equal(rows, ones) and torch.equal(rows, (w * 2).round() / 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 0}, "for groups of 0"),
        ({"size": 8}, r"scale is \[2, 1\] for groups of 8, expected \[2, 2\]"),
        ({"w": torch.zeros(2, 16).double()}, "w is torch.float64"),
        ({"scale": torch.ones(2, 1).half()}, "scale is torch.float16"),
        ({"codebook": "int4"}, "codebook is 'int4'"),
    ],
)
def test_what_is_refused(change, message):
    given = dict(next(arguments for name, arguments in cases() if name == "int4-1x64-1"))
    given |= {"w": torch.zeros(2, 16), "scale": torch.ones(2, 1), "size": 16}
    with pytest.raises(ValueError, match=message):
        round_to_grid(**given | change)
