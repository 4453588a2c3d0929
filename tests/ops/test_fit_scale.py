import pytest
import torch

from qcli import codebooks
from qcli.methods.rtn import RoundToNearest
from qcli.ops.fit_scale import cases, fit_scale

FORMS = [
    ("", 2, False),
    ("", 2, True),
    ("", 3, False),
    ("", 3, True),
    ("", 4, False),
    ("", 8, True),
    ("nf4", 4, False),
    ("fp4", 4, False),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_blocks(x, size):
    return torch.nn.functional.pad(x.float().flatten(), (0, -x.numel() % size)).view(-1, size)


def ascending(codebook):
    """The values of a codebook, and the thresholds between them."""
    if codebook == "nf3":
        return torch.from_numpy(codebooks.NF3), torch.from_numpy(codebooks.NF3_THRESHOLDS)
    values = codebooks.CODEBOOKS[codebook][codebooks.ORDER[codebook]]
    return torch.from_numpy(values), torch.from_numpy(codebooks.THRESHOLDS[codebook])


def squared_error(w, scale, zero_point, codebook, bits, weights=1):
    """Of blocks w [blocks, size], in float64, with the codes of round to nearest. `weights` multiply squared errors."""
    scale = scale.unsqueeze(-1)
    if codebook:
        values, thresholds = ascending(codebook)
        v = torch.where(scale == 0, w, w / scale)
        c = values[torch.bucketize(v, thresholds)]
    else:
        zero = zero_point.unsqueeze(-1) if zero_point.numel() else 0
        c = ((w / scale).round() + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) - zero
    return ((w.double() - c.double() * scale.double()).square() * weights).sum(-1)


def factor_one(w, codebook, bits, zero_point, dtype):
    """The scale and the zero point of round to nearest."""
    none = torch.empty(0, dtype=torch.int8)
    if codebook:
        return w.abs().amax(-1).to(dtype).float(), none
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = ((high - low) / (most - least) if zero_point else torch.maximum(-low, high) / ((most - least) / 2)).to(dtype).float()
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    if not zero_point:
        return scale, none
    return scale, (least - low / scale).round().clamp(least, most).nan_to_num(0.0).to(torch.int8)


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_no_case_is_worse_than_round_to_nearest(name, arguments):
    scale, zero = fit_scale(**arguments)
    w = as_blocks(arguments["x"], arguments["size"])
    form = [arguments[key] for key in ("codebook", "bits")]
    first, first_zero = factor_one(w, *form, arguments["zero_point"], arguments["dtype"])
    assert scale.dtype == torch.float32 and scale.shape == (len(w),)
    assert zero.dtype == torch.int8 and zero.shape == ((len(w),) if arguments["zero_point"] else (0,))
    torch.testing.assert_close(scale, scale.to(arguments["dtype"]).float(), rtol=0, atol=0, equal_nan=True)
    weights = 1
    if "weights" in arguments:
        weights = as_blocks(arguments["weights"].double().expand_as(arguments["x"]), arguments["size"])
    ours, theirs = squared_error(w, scale, zero, *form, weights), squared_error(w, first, first_zero, *form, weights)
    assert (ours.isnan() | (ours <= theirs * (1 + 1e-6))).all()
    kept = ~w.isfinite().all(-1) | ~first.isfinite() | (w.abs().amax(-1) > 2.0**50) | (w.abs().amax(-1) < 2.0**-50)
    torch.testing.assert_close(scale[kept], first[kept], rtol=0, atol=0, equal_nan=True)
    if zero.numel():
        assert torch.equal(zero[kept], first_zero[kept])


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("bits, zero_point", [(4, False), (4, True), (8, False), (8, True)])
def test_the_factor_one_is_the_scale_of_the_method(bits, zero_point, dtype):
    """Such large weights are not searched."""
    x = (normal(8, 256) * 2.0**60).to(dtype)
    encoder = RoundToNearest(bits, 64, zero_point).encoder(8, 256, torch.device("cpu"))
    encoder.feed(x.flatten(), 0)
    parts, _ = encoder.finish()
    scale, zero = fit_scale(x, 64, "", bits, zero_point, dtype)
    assert torch.equal(scale, parts["scale"].flatten().float())
    if zero_point:
        assert torch.equal(zero, parts["zero_point"].flatten())


@pytest.mark.parametrize("codebook, bits, zero_point", FORMS)
def test_a_dense_search_finds_little_more(codebook, bits, zero_point):
    w = normal(300, 16)
    w[::3, 5] *= 4
    options = codebook, bits
    ours = squared_error(w, *fit_scale(w, 16, *options, zero_point, torch.float32), *options)
    start, _ = factor_one(w, *options, False, torch.float32)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    dense = torch.full_like(ours, torch.inf)
    for factor in torch.linspace(0.2, 1.6, 400):
        scale, zero = start * factor, torch.empty(0)
        if zero_point:
            scale = (high - low) / (most - least) * factor
            zero = (least - low * factor / scale).round().clamp(least, most)
        for sign in (1, -1) if not codebook and not zero_point else (1,):
            dense = torch.minimum(dense, squared_error(w, sign * scale, zero, *options))
    assert ours.sum() <= (1.01 if bits < 8 else 1.04) * dense.sum()


@pytest.mark.parametrize("bits, gain", [(2, 0.5), (3, 0.34), (4, 0.21), (8, 0.12)])
def test_what_the_search_gains_for_normal_weights(bits, gain):
    w = normal(500, 64)
    found = squared_error(w, *fit_scale(w, 64, "", bits, False, torch.float32), "", bits).sum()
    first = squared_error(w, *factor_one(w, "", bits, False, torch.float32), "", bits).sum()
    assert found <= (1 - gain) * first


@pytest.mark.parametrize("sign", [1, -1])
def test_the_larger_side_gets_the_additional_code(sign):
    """-8 to 7 halves on one side: the refit finds the scale that has no error at all."""
    w = sign * torch.arange(-8, 8).float().view(1, 16) / 2
    scale, _ = fit_scale(w, 16, "", 4, False, torch.float32)
    assert scale.tolist() == [sign * 0.5]


@pytest.mark.parametrize("codebook", ["nf4", "fp4", "nf3"])
def test_what_a_codebook_stores_exactly_keeps_its_absmax(codebook):
    w = ascending(codebook)[0] * 3
    assert fit_scale(w, 16, codebook, 4, False, torch.float32)[0].tolist() == [3]


def test_a_codebook_does_not_use_bits_and_zero_point():
    x = normal(4, 64)
    scale, zero = fit_scale(x, 64, "nf4", 0, True, torch.float32)
    assert torch.equal(scale, fit_scale(x, 64, "nf4", 4, False, torch.float32)[0]) and zero.shape == (0,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("codebook, bits, zero_point", FORMS)
def test_non_finite_values_change_only_their_block(codebook, bits, zero_point, bad):
    x = normal(6, 48)
    clean = fit_scale(x, 48, codebook, bits, zero_point, torch.bfloat16)
    x[2, 7] = bad
    others = torch.arange(6) != 2
    for found, before in zip(fit_scale(x, 48, codebook, bits, zero_point, torch.bfloat16), clean):
        if found.numel():
            assert torch.equal(found[others], before[others])
    assert not fit_scale(x, 48, codebook, bits, zero_point, torch.bfloat16)[0][2].isfinite()


@pytest.mark.parametrize("size", [1, 7, 50, 64])
@pytest.mark.parametrize("codebook, bits, zero_point", FORMS)
def test_a_block_is_found_as_if_it_were_alone(codebook, bits, zero_point, size):
    x = normal(3 * size + (size + 1) // 2)
    options = size, codebook, bits, zero_point, torch.float16
    whole = fit_scale(x, *options)
    alone = [fit_scale(part, *options) for part in x.split(size)]
    for found, parts in zip(whole, zip(*alone)):
        assert torch.equal(found, torch.cat(parts))


@pytest.mark.parametrize("codebook", ["", "nf4"])
def test_blocks_of_zeros(codebook):
    scale, _ = fit_scale(torch.zeros(64), 32, codebook, 4, False, torch.float16)
    assert scale.tolist() == [0.0 if codebook else torch.finfo(torch.float16).eps] * 2


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"size": 0}, ValueError, "size is 0"),
        ({"bits": 1}, ValueError, "bits is 1"),
        ({"bits": 9}, ValueError, "bits is 9"),
        ({"codebook": "nf5"}, ValueError, "codebook is 'nf5'"),
        ({"dtype": torch.int8}, TypeError, "dtype is torch.int8"),
        ({"x": torch.zeros(4, dtype=torch.float64)}, TypeError, "x is torch.float64"),
    ],
)
def test_what_is_refused(change, error, message):
    arguments = {"x": torch.zeros(4), "size": 4, "codebook": "", "bits": 4, "zero_point": False, "dtype": torch.float32}
    with pytest.raises(error, match=message):
        fit_scale(**(arguments | change))
