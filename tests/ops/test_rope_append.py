import pytest
import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved_rotary
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotary

from qcli.ops.rope_append import _kernel, cases, record, rope_append, tables
from qcli.runtime import cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def given(tokens=3, heads=6, kv_heads=2, head_dim=64, v_dim=64, rot_dim=64, interleaved=False, stored=torch.float32, **more):
    capacity, start, dtype = more.pop("capacity", 40), more.pop("start", 7), more.pop("dtype", torch.float32)
    generator = torch.Generator().manual_seed(head_dim)
    sizes = ((heads, head_dim), (kv_heads, head_dim), (kv_heads, v_dim))
    q, k, v = (torch.randn(tokens, *size, generator=generator).to(dtype) for size in sizes)
    cos, sin = tables(start + tokens, rot_dim, interleaved) if rot_dim else (None, None)
    scaled = stored == torch.int8
    return {
        "q": q,
        "k": k,
        "v": v,
        "cos": cos,
        "sin": sin,
        "keys": torch.zeros(kv_heads, capacity, head_dim, dtype=stored),
        "values": torch.zeros(kv_heads, capacity, v_dim, dtype=stored),
        "key_scales": torch.zeros(kv_heads, capacity) if scaled else None,
        "value_scales": torch.zeros(kv_heads, capacity) if scaled else None,
        "start": torch.tensor(start),
        "interleaved": interleaved,
    }


def oracle(a):
    """q and k as transformers rotates them, in float64."""
    start, tokens = int(a["start"]), len(a["q"])
    q, k = a["q"].double(), a["k"].double()
    if a["cos"] is None:
        return q, k
    cos, sin = (table[start : start + tokens].double() for table in (a["cos"], a["sin"]))
    rot_dim, apply = cos.shape[1], interleaved_rotary if a["interleaved"] else rotary
    turned = apply(q[..., :rot_dim], k[..., :rot_dim], cos, sin, unsqueeze_dim=1)
    return tuple(torch.cat((first, x[..., rot_dim:]), -1) for first, x in zip(turned, (q, k)))


def check(a):
    q, k = oracle(a)
    others = [a[name].clone() for name in ("k", "v")]
    dtype, v = a["q"].dtype, a["v"].double()
    rope_append(**a)
    close = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    torch.testing.assert_close(a["q"].double(), q, rtol=close[dtype], atol=1e-6)
    assert all(map(torch.equal, (a["k"], a["v"]), others))
    capacity = a["keys"].shape[1]
    slots = (int(a["start"]) + torch.arange(len(q))) % capacity
    for cache, scales, rows in ((a["keys"], a["key_scales"], k), (a["values"], a["value_scales"], v)):
        found, rows = cache[:, slots].double(), rows.transpose(0, 1)
        if scales is None:
            torch.testing.assert_close(found, rows, rtol=close[cache.dtype], atol=1e-6)
        else:
            absmax = rows.abs().amax(-1)
            torch.testing.assert_close(scales[:, slots].double(), absmax / 127, rtol=1e-6, atol=0)
            step = scales[:, slots].double().unsqueeze(-1)
            assert ((found * step - rows).abs() <= 0.501 * step).all() and (found.abs().amax(-1) == 127).all()
        unused = torch.ones(capacity, dtype=torch.bool).index_fill(0, slots, False)
        assert not cache[:, unused].any()


@pytest.mark.parametrize("name, arguments", [pytest.param(n, a, id=n) for n, a in cases()])
def test_cases_equal_transformers(name, arguments):
    check({key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()})


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [16, 20, 64, 80, 96, 128, 256])
def test_any_head(head_dim, interleaved):
    for rot_dim in {head_dim, head_dim // 2 // 2 * 2, 2, 0}:
        for stored in DTYPES:
            check(given(head_dim=head_dim, v_dim=head_dim + 4, rot_dim=rot_dim, interleaved=interleaved, stored=stored))


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", range(1, 9))
def test_any_number_of_tokens_and_a_ring(tokens, stored):
    for kv_heads, start in ((1, 0), (3, 1000)):
        check(given(tokens, 3 * kv_heads, kv_heads, 16, 16, 16, stored=stored, capacity=9, start=start))


def test_the_tables_are_those_of_transformers():
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, rope_theta=10000.0)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(20).unsqueeze(0))
    for ours, theirs in zip(tables(20, 64, False), (cos[0], sin[0])):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rows_of_zeros_and_of_nan_in_int8():
    a = given(tokens=4, head_dim=20, rot_dim=0, stored=torch.int8)
    a["k"][0] = 0
    a["k"][1, :, 3], a["k"][2, :, 19] = torch.nan, -torch.inf
    a["k"][3] = 2e-45  # absmax / 127 is no number above zero
    rope_append(**a)
    assert not a["keys"][:, 7:11].any()
    scales = a["key_scales"][:, 7:11]
    assert (
        (scales[:, 0] == 0).all() and scales[:, 1].isnan().all() and (scales[:, 2] == torch.inf).all() and (scales[:, 3] == 0).all()
    )
    a = given(tokens=1, head_dim=20, rot_dim=0, stored=torch.int8)
    a["k"][:] = 190 * 2.0**-149  # 1.5 steps of float32, rounded to one
    rope_append(**a)
    assert (a["keys"][:, 7] == 127).all()


def test_nan_stays_in_its_head():
    a = given(stored=torch.bfloat16)
    a["q"][1, 2, 5] = a["k"][1, 0, 5] = torch.nan
    rope_append(**a)
    assert a["q"].isnan().any(-1).nonzero().tolist() == [[1, 2]]
    assert a["keys"].isnan().any(-1).nonzero().tolist() == [[0, 8]] and not a["values"].isnan().any()


def test_parts_of_one_product_where_they_are(variant):
    """As the record of a program has them: q, k and v are views of one tensor."""
    if variant == cpu.REFERENCE:
        pytest.skip("there is no kernel")
    expected = given(stored=torch.bfloat16)
    fused = torch.cat([expected[name].flatten(1) for name in ("q", "k", "v")], 1)
    q, k, v = fused[:, :384].view(3, 6, 64), fused[:, 384:512].view(3, 2, 64), fused[:, 512:].view(3, 2, 64)
    keys, values, rest = torch.zeros_like(expected["keys"]), torch.zeros_like(expected["values"]), fused[:, 384:].clone()
    made = record(q, k, v, expected["cos"], expected["sin"], keys, values)
    _kernel(made.address, 3, 7)
    rope_append(**expected)
    assert torch.equal(q, expected["q"]) and torch.equal(fused[:, 384:], rest)
    assert torch.equal(keys, expected["keys"]) and torch.equal(values, expected["values"])


def test_threads_do_not_matter(monkeypatch, variant):
    one, other = (given(8, 64, 16, 128, 128, 128, stored=torch.int8) for _ in range(2))
    rope_append(**one)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    rope_append(**other)
    assert all(torch.equal(one[name], other[name]) for name in ("q", "keys", "values", "key_scales", "value_scales"))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"k": torch.zeros(3, 1, 64)}, ValueError, r"rope_append: k is \[3, 1, 64\], expected \[3, 2, 64\]"),
        ({"q": torch.zeros(3, 6, 60)}, ValueError, r"rope_append: q is \[3, 6, 60\], expected \[3, 'heads', 64\]"),
        ({"keys": torch.zeros(2, 2, 64), "values": torch.zeros(2, 2, 64)}, ValueError, "3 tokens, expected at most the cache's 2"),
        ({"sin": None}, ValueError, "only one of cos and sin"),
        ({"cos": torch.zeros(10, 66), "sin": torch.zeros(10, 66)}, ValueError, "rot_dim is 66, expected an even number up to 64"),
        ({"keys": torch.zeros(2, 40, 64, dtype=torch.int8)}, TypeError, "values are torch.float32, expected"),
        ({"key_scales": torch.zeros(2, 40)}, ValueError, "key_scales are given; scales belong to int8, and keys are torch.float32"),
        ({"keys": torch.zeros(2, 64, 40).transpose(1, 2)}, ValueError, "keys have strides"),
    ],
)
def test_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=message):
        rope_append(**given() | change)


def test_positions_beyond_the_tables_are_refused(variant):
    if variant == cpu.REFERENCE:
        pytest.skip("torch's own error")
    with pytest.raises(ValueError, match="positions 8 to 10, expected 0 to 9, the rows of cos"):
        rope_append(**given() | {"start": torch.tensor(8)})
