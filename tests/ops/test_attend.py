import pytest
import torch

from qcli.ops.attend import _kernel, attend, cases, record
from qcli.ops.rope_append import quantized
from qcli.runtime import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def given(tokens=2, heads=6, kv_heads=2, head_dim=64, v_dim=None, context=100, stored=torch.float32, **more):
    """Arguments for the last tokens of a text of `context` tokens."""
    v_dim, capacity = v_dim or head_dim, more.pop("capacity", context)
    generator = torch.Generator().manual_seed(context)
    keys, values = (torch.randn(kv_heads, capacity, dim, generator=generator) for dim in (head_dim, v_dim))
    scales = None, None
    if stored == torch.int8:
        (keys, key_scales), (values, value_scales) = quantized(keys), quantized(values)
        scales = key_scales, value_scales
    return {
        "q": torch.randn(tokens, heads, head_dim, generator=generator) * more.pop("size", 1.0),
        "keys": keys.to(stored),
        "values": values.to(stored),
        "key_scales": scales[0],
        "value_scales": scales[1],
        "sinks": None,
        "start": torch.tensor(context - tokens),
        "scale": head_dim**-0.5,
    } | more


def stored_text(a):
    """The keys and values of all positions that are in the cache, in float64, and these positions."""
    last, capacity = int(a["start"]) + len(a["q"]) - 1, a["keys"].shape[1]
    positions = torch.arange(max(0, last + 1 - capacity), last + 1)
    k, v = (a[name][:, positions % capacity].double() for name in ("keys", "values"))
    if a["key_scales"] is not None:
        k *= a["key_scales"][:, positions % capacity].double().unsqueeze(-1)
        v *= a["value_scales"][:, positions % capacity].double().unsqueeze(-1)
    return k, v, positions


def oracle(a):
    """The formula in float64, one token and head at a time."""
    k, v, positions = stored_text(a)
    tokens, heads = a["q"].shape[:2]
    y = torch.empty(tokens, heads, v.shape[-1], dtype=torch.float64)
    for t in range(tokens):
        position = int(a["start"]) + t
        seen = positions <= position
        if a.get("window"):
            seen &= positions > position - a["window"]
        for h in range(heads):
            of_head = h // (heads // len(k))
            s = k[of_head, seen] @ a["q"][t, h].double() * a["scale"]
            if a.get("softcap"):
                s = a["softcap"] * torch.tanh(s / a["softcap"])
            weights = s.exp()
            total = weights.sum() + (0 if a["sinks"] is None else a["sinks"][h].double().exp())
            y[t, h] = (weights @ v[of_head, seen]) / total
    return y


def check(a, rtol=0.0, atol=3e-6):
    y = attend(**a)
    assert y.dtype == a["q"].dtype
    torch.testing.assert_close(y.double(), oracle(a), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_the_formula(name, arguments):
    rtol = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[arguments["q"].dtype]
    check(arguments, rtol)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 96, 128, 256])
def test_equals_torchs_attention(head_dim, stored):
    a = given(4, 6, 2, head_dim, context=70, stored=stored)
    k, v, _ = stored_text(a)
    mask = torch.ones(70, 70, dtype=torch.bool).tril()[-4:]
    q = a["q"].double().transpose(0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(attend(**a).double().transpose(0, 1), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("context", [1, 5, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000, 4096])
def test_any_context(context, stored):
    check(given(1, 3, 1, 16, context=context, stored=stored))
    check(given(min(5, context), 4, 4, 24, 20, context=context, stored=stored, capacity=context + 3, size=3.0), atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tokens", range(1, 9))
def test_any_number_of_queries(tokens, group):
    check(given(tokens, 2 * group, 2, 20, 36, context=80))


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("window, context", [(1, 50), (16, 16), (16, 17), (100, 60), (100, 700), (300, 1000)])
def test_windows_in_a_ring(tokens, window, context):
    more = {"softcap": 5.0, "sinks": torch.linspace(-2, 6, 4)} if window == 16 else {}
    check(given(tokens, 4, 2, 32, context=context, capacity=window + tokens - 1, window=window, **more))
    check(given(tokens, 4, 2, 32, context=context, capacity=window + tokens + 40, window=window, stored=torch.int8))


def test_softcap_and_sinks():
    for context in (9, 300, 1000):
        check(given(3, 4, 2, 48, context=context, size=6.0, softcap=30.0), atol=2e-5)
        check(given(3, 4, 2, 48, context=context, size=6.0, softcap=0.5))
        check(given(3, 4, 2, 48, context=context, sinks=torch.tensor([-50.0, 0.0, 8.0, 50.0])))


def test_large_scores():
    """The softmax is that of one position, and nothing overflows."""
    a = given(1, 2, 2, 32, context=600, size=1e4)
    k, v, _ = stored_text(a)
    best = torch.einsum("hd,hpd->hp", a["q"][0].double(), k).argmax(-1)
    torch.testing.assert_close(attend(**a)[0].double(), v[torch.arange(2), best], rtol=1e-5, atol=1e-5)


def test_slots_that_were_never_written_do_not_matter():
    a = given(2, 4, 2, 24, context=20, capacity=90, stored=torch.float16)
    expected = attend(**a)
    for name in ("keys", "values"):
        a[name][:, 20:] = torch.nan
    assert torch.equal(attend(**a), expected)


def test_nan_and_infinity_stay_in_their_head():
    a = given(2, 4, 2, 24, context=600)
    expected = attend(**a)
    a["q"][1, 3, 5] = torch.nan
    a["keys"][0, 300, 3] = torch.inf  # a score of infinity, of one sign or the other
    a["q"][0, :2, 3], a["q"][1, :2, 3] = 1.0, -1.0
    y = attend(**a)
    assert torch.equal(y[0, 2:], expected[0, 2:]) and torch.equal(y[1, 2], expected[1, 2])
    assert y[1, 3].isnan().all() and y[0, :2].isnan().all()
    assert y[1, :2].isfinite().all()  # the position has no weight
    a["keys"][:] = -torch.inf
    a["q"][:] = 1.0
    assert attend(**a).isnan().all()


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_threads_and_variants_do_not_matter(stored, monkeypatch, variant):
    if variant == cpu.REFERENCE:
        pytest.skip("compares kernels")
    cases = [
        given(1, 9, 3, 64, context=4096, stored=stored),
        given(8, 8, 1, 80, 24, context=1500, stored=stored, softcap=20.0),
        given(3, 4, 4, 128, context=20000, capacity=900, window=800, stored=stored, sinks=torch.zeros(4)),
    ]
    for a in cases:
        one = attend(**a)
        for threads in (2, 3, 64):
            with monkeypatch.context() as patched:
                patched.setattr(torch, "get_num_threads", lambda: threads)  # noqa: B023
                assert torch.equal(attend(**a), one)
        with cpu.using("generic"):
            assert torch.equal(attend(**a), one)


def test_more_pieces_than_there_may_be():
    check(given(1, 2, 1, 16, context=64 * 256 + 700, stored=torch.float16))


def test_parts_of_one_product_where_they_are(variant):
    if variant == cpu.REFERENCE:
        pytest.skip("there is no kernel")
    a = given(3, 4, 2, 20, 24, context=40)
    fused, y = torch.randn(3, 200), torch.zeros(3, 100)
    q, out = fused[:, 10:90].view(3, 4, 20), y[:, :96].view(3, 4, 24)
    q.copy_(a["q"])
    made = record(q, a["keys"], a["values"], out, scale=a["scale"])
    _kernel(made.address, 2, 37)
    assert torch.equal(out[:2], attend(**a)[:2]) and not y[:, 96:].any() and not y[2].any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": torch.zeros(2, 5, 64)}, r"attend: q is \[2, 5, 64\], expected \[tokens, heads, 64\] with a multiple of 2 heads"),
        ({"sinks": torch.zeros(5)}, r"attend: sinks are \[5\], expected \[6\]"),
        ({"window": -1}, "attend: window is -1, expected 0 or more"),
        ({"values": torch.zeros(2, 99, 64)}, r"attend: values are \[2, 99, 64\], expected \[kv_heads, capacity, dim\]"),
    ],
)
def test_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        attend(**given() | change)


def test_a_cache_that_lacks_positions_is_refused(variant):
    if variant == cpu.REFERENCE:
        pytest.skip("the reference attends to what there is")
    with pytest.raises(ValueError, match="attend: start is 99, and 101 positions are needed; the cache has 100"):
        attend(**given() | {"start": torch.tensor(99)})
    with pytest.raises(ValueError, match="attend: start is 500, and 101 positions are needed; the cache has 100"):
        attend(**given() | {"start": torch.tensor(500), "window": 100})
