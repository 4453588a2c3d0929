"""`qcli.evaluate` against loops over whole transformers models, and the demo model's costs."""

import json
import math
import shutil

import bitsandbytes.functional as F
import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

import qcli
from qcli.errors import NonFiniteError, UsageError
from qcli.schemes import BY_TEXTS, NAMED
from tests.conftest import ROOT
from tests.models import add_tokenizer, make_model

DEMO = ROOT / "examples/demo-model"
STORIES = [json.loads(line)["text"] for line in (ROOT / "examples/stories.jsonl").read_text().splitlines()[:40]]


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in STORIES))
    return path


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "long.txt"
    path.write_text(" ".join(STORIES[:6]))
    return path


def predictions(model, tokenizer, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """(log probabilities of all tokens, the tokens that came), each text by itself. float64."""
    logp, targets = [], []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            logp.append(model(ids).logits[0, :-1].double().log_softmax(1))
            targets.append(ids[0, 1:])
    return torch.cat(logp), torch.cat(targets)


@pytest.fixture(scope="module")
def whole():
    """The demo model and its tokenizer through transformers, in float32."""
    return (
        transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval(),
        transformers.AutoTokenizer.from_pretrained(DEMO),
    )


def assert_perplexity(row, losses, scored_bytes):
    assert row.quality.tokens == len(losses) and row.quality.bytes == scored_bytes
    assert row.quality.loss.value == pytest.approx(losses.mean().item(), rel=1e-5)
    assert row.quality.perplexity.value == pytest.approx(losses.mean().exp().item(), rel=1e-5)
    assert row.quality.loss.error == pytest.approx(losses.std().item() / math.sqrt(len(losses)), rel=1e-4)
    assert row.quality.bits_per_byte.value == pytest.approx(losses.sum().item() / math.log(2) / scored_bytes, rel=1e-5)


def test_perplexity_of_documents_is_that_of_a_loop(stories, whole):
    result = qcli.evaluate(str(DEMO), text=stories, dtype="float32", device="cpu")
    logp, targets = predictions(*whole, STORIES)
    assert_perplexity(result.rows[0], -logp.gather(1, targets[:, None])[:, 0], sum(len(s.encode()) for s in STORIES))
    assert (result.protocol.documents, result.protocol.windows, result.protocol.bos) == (40, 40, True)
    size = (DEMO / "model.safetensors").stat().st_size
    assert size - 10_000 < result.rows[0].bytes < size and result.rows[0].bits_per_weight == 16


@pytest.mark.parametrize("length, stride", [(64, 64), (64, 24)])
def test_perplexity_of_windows_is_that_of_the_usual_loop(tmp_path, long_text, length, stride):
    """Without BOS, as transformers' guide to perplexity has it: what a window shares with the one before is masked."""
    model = make_model("qwen2", tmp_path, torch.float32)
    add_tokenizer(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(long_text.read_text(), return_tensors="pt")["input_ids"]
    losses, previous = [], 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin] = -100
        with torch.inference_mode():
            logits = model(ids[:, begin:end]).logits
        kept = functional.cross_entropy(logits[0, :-1].double(), labels[0, 1:], reduction="none", ignore_index=-100)
        losses.append(kept[labels[0, 1:] != -100])
        previous = end
        if end == ids.shape[1]:
            break
    found = qcli.evaluate(str(tmp_path), text=long_text, sequence_length=length, stride=stride, device="cpu")
    losses = torch.cat(losses)
    assert_perplexity(found.rows[0], losses, len(losses))  # a byte is a token here


def test_windows_in_one_batch_or_alone(long_text, monkeypatch):
    """Neither the batches nor the chunks of logits change anything beyond the rounding of sums."""
    from qcli.evaluation import score
    from qcli.streaming import reading

    options = {"text": long_text, "sequence_length": 50, "stride": 30, "dtype": "float32", "device": "cpu"}
    together = qcli.evaluate(str(DEMO), **options)
    monkeypatch.setattr(reading, "BATCH_TOKENS", 1)
    monkeypatch.setattr(score, "_LOGITS", 1)
    alone = qcli.evaluate(str(DEMO), **options)
    assert together.protocol == alone.protocol
    assert alone.rows[0].quality.loss.value == pytest.approx(together.rows[0].quality.loss.value, rel=1e-6)


def test_against_a_base_is_torchs_divergence(stories, whole, tmp_path):
    qcli.quantize(str(DEMO), tmp_path / "nf4", device="cpu")
    result = qcli.evaluate(str(tmp_path / "nf4"), against=str(DEMO), text=stories, dtype="float32", device="cpu")
    model, _ = qcli.load(str(tmp_path / "nf4"), dtype="float32", device="cpu")
    p, targets = predictions(*whole, STORIES)
    q, _ = predictions(model, whole[1], STORIES)
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    base, other = (-logp.gather(1, targets[:, None])[:, 0] for logp in (p, q))
    assert_perplexity(result.rows[0], base, result.protocol.scored_bytes)
    assert_perplexity(result.rows[1], other, result.protocol.scored_bytes)
    found, n = result.rows[1].against, len(kl)
    assert result.rows[0].against is None and result.rows[1].name == str(tmp_path / "nf4")
    assert found.divergence.mean.value == pytest.approx(kl.mean().item(), rel=1e-3)
    assert found.divergence.percentile_99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-3)
    assert found.divergence.maximum == pytest.approx(kl.max().item(), rel=1e-3)
    assert found.same_top.value == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item(), abs=1.5 / n)
    assert found.loss_change.value == pytest.approx((other - base).mean().item(), rel=1e-3)
    assert found.loss_change.error == pytest.approx((other - base).std().item() / math.sqrt(n), rel=1e-3)
    stored = json.loads((tmp_path / "nf4/qcli.json").read_text())
    assert result.rows[1].bytes < result.rows[0].bytes / 3 and stored["method"] == "nf4"
    assert 4 + 8 / 64 < result.rows[1].bits_per_weight < 4.5


def test_an_int8_cache_is_compared_with_the_model(stories, whole):
    """Keys and values in int8, worked out here in float64 from the model's own attention."""
    result = qcli.evaluate(str(DEMO), kv_dtype="int8", text=stories, dtype="float32", device="cpu")
    assert [row.name for row in result.rows] == [str(DEMO), f"{DEMO}, int8 cache"]
    p, _ = predictions(*whole, STORIES)
    model, _ = qcli.load(str(DEMO), dtype="float32", device="cpu")
    attention = torch.nn.functional.scaled_dot_product_attention

    def rounding(query, key, value, *arguments, **options):
        steps = [x.double().abs().amax(-1, keepdim=True) / 127 for x in (key, value)]
        key, value = (((x.double() / step).round() * step).float() for x, step in zip((key, value), steps))
        return attention(query, key, value, *arguments, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", rounding)
        q, _ = predictions(model, whole[1], STORIES)
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    assert kl.mean() > 1e-8 and result.rows[1].against.divergence.mean.value == pytest.approx(kl.mean().item(), rel=0.02)
    with pytest.raises(UsageError, match="--kv-dtype and --methods"):
        qcli.evaluate(str(DEMO), kv_dtype="int8", methods="nf4", text=stories)


@pytest.mark.parametrize("head, name", [(8, "llm-int8"), (4, "nf4")])
def test_a_quantized_head_is_compared_with_the_model(head, name, stories, whole):
    """The demo model ties its embedding to the head: both are rounded, by bitsandbytes' NF4 or row by row to int8."""
    result = qcli.evaluate(str(DEMO), head=head, text=stories, dtype="float32", device="cpu")
    assert [row.name for row in result.rows] == [str(DEMO), f"{DEMO}, head in {name}"]
    p, _ = predictions(*whole, STORIES)
    model, _ = qcli.load(str(DEMO), dtype="float32", device="cpu")
    weight = model.lm_head.weight.data
    assert weight is model.model.embed_tokens.weight.data or weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    if head == 8:
        step = weight.double().abs().amax(1, keepdim=True) / 127
        weight.copy_((weight.double() / step).round() * step)
    else:
        weight.copy_(F.dequantize_4bit(*F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)))
    q, _ = predictions(model, whole[1], STORIES)
    kl = functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    assert kl.mean() > 1e-6 and result.rows[1].against.divergence.mean.value == pytest.approx(kl.mean().item(), rel=0.02)
    saved = result.rows[0].bytes - result.rows[1].bytes
    scales = {8: 4 * weight.shape[0], 4: weight.numel() / 64}[head]
    assert saved == pytest.approx(weight.numel() * (2 - head / 8) - scales, abs=1500)  # tables and a description
    for options in ({"methods": "nf4"}, {"head": 3}):
        with pytest.raises(UsageError, match="--head and --methods|head is 3"):
            qcli.evaluate(str(DEMO), text=stories, **{"head": head, **options})


def test_the_head_of_a_quantized_model_is_not_quantized_again(tmp_path, stories):
    qcli.quantize(str(DEMO), tmp_path / "nf4")
    with pytest.raises(UsageError, match="is quantized already"):
        qcli.evaluate(str(tmp_path / "nf4"), head=8, text=stories)


@pytest.fixture(scope="module")
def costs(stories):
    """The demo model's row of each of these methods, by name."""
    names = ["int8", "llm-int8-paper", "llm-int8", "nf4"]
    result = qcli.evaluate(str(DEMO), methods=names, text=stories, device="cpu")
    assert [row.name for row in result.rows] == ["unquantized", *names] and result.simulated
    return {row.name: row for row in result.rows}


def test_vector_wise_int8_is_visibly_worse(costs):
    change = costs["int8"].against.perplexity_ratio
    assert change.value - 1 > 0.02 and change.value - 1 > 4 * change.error


def test_the_papers_form_is_within_the_paired_error(costs):
    change = costs["llm-int8-paper"].against.loss_change
    assert abs(change.value) <= 2 * change.error < 1e-3


def test_as_stored_is_in_between(costs):
    paper, stored, plain = (costs[n].against for n in ("llm-int8-paper", "llm-int8", "int8"))
    assert 3 * paper.divergence.mean.value < stored.divergence.mean.value < plain.divergence.mean.value / 100
    assert stored.perplexity_ratio.value - 1 < (plain.perplexity_ratio.value - 1) / 3
    assert paper.same_top.value > stored.same_top.value > plain.same_top.value


def test_the_outliers_hide_what_int8_does_to_the_other_columns(costs):
    plain, stored = costs["int8"], costs["llm-int8"]
    assert plain.activation_sqnr > plain.ordinary_activation_sqnr + 10
    assert stored.ordinary_activation_sqnr > plain.ordinary_activation_sqnr + 15
    assert plain.weight_sqnr == pytest.approx(stored.weight_sqnr, rel=1e-6)
    assert stored.weight_sqnr > costs["nf4"].weight_sqnr + 15
    assert costs["nf4"].activation_sqnr is None and costs["unquantized"].weight_sqnr is None


@pytest.mark.parametrize("name, method", [("llm-int8", "llm-int8"), ("nf4", "nf4")])
def test_a_simulated_method_is_what_qcli_runs(costs, whole, tmp_path, name, method):
    qcli.quantize(str(DEMO), tmp_path / method, method=method, device="cpu")
    model, _ = qcli.load(str(tmp_path / method), dtype="float32", device="cpu")
    logp, targets = predictions(model, whole[1], STORIES)
    loss = -logp.gather(1, targets[:, None]).mean().item()
    assert costs[name].quality.loss.value == pytest.approx(loss, rel=5e-5)


def test_sizes_of_methods_are_those_of_files(costs, tmp_path):
    for name, method in (("llm-int8", "llm-int8"), ("nf4", "nf4")):
        qcli.quantize(str(DEMO), tmp_path / method, method=method, device="cpu")
        [row] = qcli.evaluate(str(tmp_path / method), tokens=40, device="cpu").rows
        assert row.bytes == costs[name].bytes and row.bits_per_weight == pytest.approx(costs[name].bits_per_weight)
    kept = costs["llm-int8-paper"].bytes - costs["llm-int8"].bytes
    assert 0 < kept < costs["unquantized"].bytes and costs["unquantized"].bits_per_weight == 16


def test_transposed_layers_and_their_biases(tmp_path, long_text):
    """GPT-2 keeps its weights [in_features, out_features]."""
    make_model("gpt2", tmp_path, torch.float32)
    add_tokenizer(tmp_path)
    options = {"text": long_text, "tokens": 120, "device": "cpu", "dtype": "float32"}
    [alone] = qcli.evaluate(str(tmp_path), **options).rows
    rows = qcli.evaluate(str(tmp_path), methods="nf4", **options).rows
    assert rows[0].quality.loss.value == pytest.approx(alone.quality.loss.value, rel=1e-6)
    qcli.quantize(str(tmp_path), tmp_path / "nf4", method="nf4", device="cpu")
    [quantized] = qcli.evaluate(str(tmp_path / "nf4"), **options).rows
    assert rows[1].quality.loss.value == pytest.approx(quantized.quality.loss.value, rel=1e-6)
    assert rows[1].quality.loss.value != pytest.approx(rows[0].quality.loss.value, rel=1e-5)


def test_values_that_are_not_finite_are_placed(tmp_path, long_text):
    model = make_model("llama", tmp_path, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    model.save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    with pytest.raises(NonFiniteError, match=r"token 1 of window 1 are not finite; .* come out of model.layers.1$"):
        qcli.evaluate(str(tmp_path), text=long_text, tokens=100, device="cpu")
    with pytest.raises(NonFiniteError, match=r", unquantized: the logits for token 1 .* come out of model.layers.1$"):
        qcli.evaluate(str(tmp_path), text=long_text, tokens=100, device="cpu", methods="fp4-plain")


def test_the_window_that_breaks_is_named(tmp_path, long_text):
    """The embedding of one byte is broken, one that the first window does without."""
    model = make_model("llama", tmp_path, torch.float32)
    add_tokenizer(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)(long_text.read_text())["input_ids"]
    first = max(ids.index(i) for i in ids[:100])
    assert first >= 32
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[first]] = torch.nan
    model.save_pretrained(tmp_path)
    message = f"token 1 of window {first // 32 + 1} are not finite; .* model.layers.0$"
    with pytest.raises(NonFiniteError, match=message):
        qcli.evaluate(str(tmp_path), text=long_text, tokens=100, sequence_length=32, device="cpu")


def test_models_of_unlike_vocabularies_are_not_compared(tmp_path, long_text):
    make_model("llama", tmp_path / "a")
    add_tokenizer(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tokenizer = json.loads((tmp_path / "b/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"differ in 2 tokens: 'a' is id \d+ in .*a, id \d+ in .*b$"):
        qcli.evaluate(str(tmp_path / "a"), against=str(tmp_path / "b"), text=long_text)
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    vocabulary["another"] = vocabulary.pop("b")
    (tmp_path / "b/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"differ in 2 tokens: 'another' is not in .*a, id \d+ in .*b$"):
        qcli.evaluate(str(tmp_path / "a"), against=str(tmp_path / "b"), text=long_text)


def test_heads_of_unlike_sizes_are_not_compared(tmp_path, long_text):
    for name, size in (("a", 256), ("b", 320)):
        config = transformers.LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=size
        )
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        add_tokenizer(tmp_path / name)
    with pytest.raises(UsageError, match=r"a predicts 256 tokens, .*b 320"):
        qcli.evaluate(str(tmp_path / "a"), against=str(tmp_path / "b"), text=long_text)


def test_speed_and_memory_of_what_runs(long_text):
    result = qcli.evaluate(str(DEMO), methods="nf4,llm.int8,fp4-plain", text=long_text, tokens=60, speed=True, device="cpu")
    speeds = {row.name: row.speed for row in result.rows}
    assert speeds["fp4-plain"].weights > speeds["nf4"].weights
    assert speeds["nf4"].weights < speeds["llm-int8"].weights < speeds["unquantized"].weights
    for name in ("unquantized", "llm-int8", "nf4"):
        assert speeds[name].prefill > 0 and speeds[name].decode > 0 and speeds[name].prompt_tokens == 61
        assert speeds[name].peak_memory > speeds[name].weights
    assert np.isclose(speeds["unquantized"].weights, 2 * 1_369_728, rtol=0.01)


@pytest.mark.parametrize("options", [{"methods": "LLM.int8(),nf4-plain"}, {"against": str(DEMO)}])
def test_a_text_read_in_several_runs_gives_the_same(monkeypatch, stories, options):
    """Hidden states that do not fit together are read in several runs. Every token is scored once all the same."""
    arguments = {"text": stories, "tokens": 600, "device": "cpu", "dtype": "float32", **options}
    expected = qcli.evaluate(str(DEMO), **arguments).summary()
    monkeypatch.setattr("qcli.streaming.reading.HIDDEN_BYTES", 500_000)
    found = qcli.evaluate(str(DEMO), **arguments).summary()
    assert found["protocol"] == expected["protocol"]
    for ours, theirs in zip(found["rows"], expected["rows"]):
        assert ours["quality"]["tokens"] == theirs["quality"]["tokens"]
        assert ours["quality"]["loss"]["value"] == pytest.approx(theirs["quality"]["loss"]["value"], rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_methods_see_one_sequence_at_a_time_however_many_are_read_together(tmp_path, long_text, monkeypatch, name):
    """Windows of one length share calls, those of a last, shorter one do not; OPT hands its layers all tokens as rows."""
    from qcli.streaming import reading

    make_model(name, tmp_path, torch.float32)
    add_tokenizer(tmp_path)
    options = {"text": long_text, "tokens": 100, "sequence_length": 24, "methods": "all", "device": "cpu"}
    together = qcli.evaluate(str(tmp_path), **options)
    monkeypatch.setattr(reading, "BATCH_TOKENS", 1)
    assert_same_rows(together, qcli.evaluate(str(tmp_path), **options))


def assert_same_rows(result, other):
    for ours, theirs in zip(result.rows, other.rows, strict=True):
        assert ours.bytes == theirs.bytes
        assert ours.quality.loss.value == pytest.approx(theirs.quality.loss.value, rel=1e-5)
        for field in ("weight_sqnr", "activation_sqnr", "ordinary_activation_sqnr"):
            assert getattr(ours, field) == pytest.approx(getattr(theirs, field), abs=1e-2)


def test_an_experts_share_of_the_tokens_is_read_window_by_window(tmp_path, long_text, monkeypatch):
    """Nothing says to which window the tokens of an expert belong."""
    from qcli.streaming import reading

    def every_second(self, x):
        rows = x.reshape(-1, x.shape[-1])
        hidden = self.act_fn(self.gate_proj(rows)) * self.up_proj(rows)
        shares = [self.down_proj(hidden[i::2]) for i in (0, 1)]
        y = torch.empty_like(rows)
        y[0::2], y[1::2] = shares
        return y.view(x.shape)

    make_model("llama", tmp_path, torch.float32)
    add_tokenizer(tmp_path)
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", every_second)
    seen = []
    read = reading.Reading.__init__
    monkeypatch.setattr(
        reading.Reading, "__init__", lambda self, *a, **options: (seen.append(options["alone"]), read(self, *a, **options))[1]
    )
    options = {"text": long_text, "tokens": 100, "sequence_length": 24, "methods": "int8-per-tensor,LLM.int8()", "device": "cpu"}
    result = qcli.evaluate(str(tmp_path), **options)
    assert seen == [False, True]
    monkeypatch.setattr(reading, "BATCH_TOKENS", 1)
    assert result.summary() == qcli.evaluate(str(tmp_path), **options).summary()


def test_a_method_whose_groups_do_not_divide_a_row_is_left_out(tmp_path, long_text):
    config = transformers.LlamaConfig(
        hidden_size=96, intermediate_size=576, num_hidden_layers=1, num_attention_heads=2, vocab_size=256
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    add_tokenizer(tmp_path)
    options = {"text": long_text, "tokens": 60, "device": "cpu"}
    result = qcli.evaluate(str(tmp_path), methods="all", **options)
    assert [row.name for row in result.rows] == [name for name in NAMED if name not in ("rtn", "hqq", *BY_TEXTS)]
    assert [note.split(" (")[0] for note in result.notes] == [
        "rtn is left out: groups of 128 do not divide rows of 96; a group size of 32 does",
        "rtn is left out: groups of 128 do not divide rows of 576; a group size of 64 does",
        "hqq is left out: groups of 64 do not divide rows of 96; a group size of 32 does",
    ]
    assert "model.layers.0.mlp.down_proj" in result.notes[1]
    with pytest.raises(UsageError, match="^rtn is left out: groups of 128 do not divide rows of 96"):
        qcli.evaluate(str(tmp_path), methods="rtn", **options)
