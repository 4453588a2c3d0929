"""Each field of transformers' GenerationConfig: obeyed as transformers does, overridden with a warning, put aside, refused."""

import json
import warnings

import pytest
import torch
import transformers

import qcli
from qcli.errors import CheckpointError, QcliWarning
from qcli.generation import decode
from qcli.generation import graph as decode_graph
from qcli.loading import generation_config
from tests.captures import call_it
from tests.models import add_tokenizer, make_model

PROMPT = [98, 237, 51, 44, 108, 229, 192, 15]
SAMPLED = {"do_sample": True, "temperature": 1.5}
COLD = {"do_sample": True, "temperature": 0.2}

# field -> what a generation config may have beside others that make it count
OBEYED = {
    "max_length": {"max_length": 12},
    "max_new_tokens": {"max_new_tokens": 3},
    "min_length": {"min_length": 24, "eos_token_id": list(range(0, 256, 2))},
    "min_new_tokens": {"min_new_tokens": 14, "eos_token_id": list(range(0, 256, 2))},
    "max_time": {"max_time": 0.0},
    "eos_token_id": {"eos_token_id": list(range(0, 256, 2))},
    "do_sample": {"do_sample": True, "top_k": 0},
    "temperature": {"do_sample": True, "temperature": 3, "top_k": 0},
    "top_k": SAMPLED | {"top_k": 3},
    "top_p": SAMPLED | {"top_p": 0.5},
    "min_p": COLD | {"min_p": 0.5},
    "top_h": SAMPLED | {"top_h": 0.4},
    "typical_p": SAMPLED | {"typical_p": 0.4},
    "epsilon_cutoff": SAMPLED | {"epsilon_cutoff": 0.02},
    "eta_cutoff": COLD | {"eta_cutoff": 0.3},
    "repetition_penalty": {"repetition_penalty": 2.0},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 2.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(0, 256, 2)]},
    "renormalize_logits": SAMPLED | {"renormalize_logits": True},
    "forced_bos_token_id": {"forced_bos_token_id": 7},
    "forced_eos_token_id": {"forced_eos_token_id": 255, "max_new_tokens": 5},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 2.0]},
    "suppress_tokens": {"suppress_tokens": list(range(0, 256, 2))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(0, 256, 2))},
    "sequence_bias": {"sequence_bias": [[[i], 9] for i in range(2, 256, 2)]},
    "guidance_scale": {"guidance_scale": 2.5},
    "watermarking_config": {"watermarking_config": {"bias": 9.0, "greenlist_ratio": 0.3}},
    "pad_token_id": {"pad_token_id": 4},
    "bos_token_id": {"bos_token_id": 4},
    "decoder_start_token_id": {"decoder_start_token_id": 4},
    "use_cache": {"use_cache": False},
}
# These leave a decoder's greedy text as it is: it is their not failing that is shown.
WITHOUT_EFFECT = {
    "renormalize_logits",
    "forced_bos_token_id",
    "remove_invalid_values",
    "pad_token_id",
    "bos_token_id",
    "decoder_start_token_id",
    "use_cache",
}
OVERRIDDEN = {
    "cache_implementation": "static",
    "prefill_chunk_size": 2,
    "num_beams": 3,
    "num_beam_groups": 2,
    "num_return_sequences": 3,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "constraints": [{"type": "phrase"}],
    "force_words_ids": [[5]],
    "token_healing": True,
    "use_mtp": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 1,
    "speculation_type": "dflash",
    "compile_config": {"mode": "default"},
}
PUT_ASIDE = {
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 9,
    "early_stopping": "sometimes",
    "length_penalty": 2.0,
    "diversity_penalty": "x",
    "low_memory": True,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 2,
    "target_lookbehind": 2,
    "assistant_ensemble_weight": 0.5,
    "max_matching_ngram_size": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "disable_compile": False,
    "continuous_batching_config": {},
    "transformers_version": "4.0.0",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small Llama in float32 and its folder, whose tokenizer ends a text with token 255."""
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", folder, torch.float32)
    add_tokenizer(folder)
    loaded, tokenizer = qcli.load(str(folder), device="cpu")
    return folder, loaded, tokenizer


@pytest.fixture(params=["loop", "captured"])
def way(request, monkeypatch):
    """transformers' own loop, and the captured step with a stand-in for CUDA's graphs."""
    if request.param == "captured":
        monkeypatch.setattr(decode_graph, "capture_for", lambda model: call_it)


def written(model, values: dict, **sampling) -> list[int]:
    """The ids that follow PROMPT where the generation config has `values`, loaded as a file would be."""
    folder, loaded, tokenizer = model
    own = loaded.generation_config
    (folder / "generation_config.json").write_text(json.dumps(values))
    try:
        source = qcli.checkpoint.source.open_source(str(folder))
        loaded.generation_config = generation_config.for_loading(
            source, loaded.config
        ) or transformers.GenerationConfig.from_pretrained(folder)
        options = {"max_new_tokens": 20, "seed": 5} if not {"max_new_tokens", "max_length"} & set(values) else {"seed": 5}
        heard = []
        result = decode.generate(loaded, tokenizer, PROMPT, decode.Sampling(**options | sampling), heard.append)
        assert heard == result.token_ids
        return heard
    finally:
        loaded.generation_config = own
        (folder / "generation_config.json").unlink()


def by_transformers(model, values: dict) -> list[int]:
    """The same by transformers alone."""
    ids = torch.tensor([PROMPT])
    options = {"eos_token_id": [255], "pad_token_id": 0} | values
    if not {"max_new_tokens", "max_length"} & set(values):
        options["max_new_tokens"] = 20
    if "eos_token_id" in values:
        options["eos_token_id"] = [*values["eos_token_id"], 255]
    if "temperature" in options:
        options["temperature"] = float(options["temperature"])
    if "sequence_bias" in options:
        options["sequence_bias"] = [[ids, float(bias)] for ids, bias in options["sequence_bias"]]
    torch.manual_seed(5)
    return model[1].generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(PROMPT) :].tolist()


def test_the_table_has_every_field():
    """Fails where transformers has a field that the table lacks: decide what becomes of it, and give it a value here."""
    known = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert known <= set(generation_config.FIELDS)
    assert set(generation_config.FIELDS) == {*OBEYED, *OVERRIDDEN, *PUT_ASIDE, "stop_strings"}


@pytest.mark.parametrize("name", OBEYED)
def test_obeyed(name, model, way):
    if not hasattr(transformers.GenerationConfig(), name):
        pytest.skip("this transformers has no such field")
    with warnings.catch_warnings():
        warnings.simplefilter("error", QcliWarning)
        found = written(model, OBEYED[name])
    assert found == by_transformers(model, OBEYED[name])
    without = written(model, {n: v for n, v in OBEYED[name].items() if n != name})
    assert (found == without) == (name in WITHOUT_EFFECT)


@pytest.mark.parametrize("name", OVERRIDDEN)
@pytest.mark.parametrize("sampled", [{}, SAMPLED])
def test_overridden_with_a_warning(name, sampled, model, way):
    expected = written(model, sampled)
    with pytest.warns(QcliWarning, match=f"has {name} ") as told:
        assert written(model, sampled | {name: OVERRIDDEN[name]}) == expected
    assert len([w for w in told if w.category is QcliWarning]) == 1


@pytest.mark.parametrize("name", PUT_ASIDE)
def test_put_aside(name, model, way):
    expected = written(model, SAMPLED)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QcliWarning)
        assert written(model, SAMPLED | {name: PUT_ASIDE[name]}) == expected


@pytest.mark.parametrize("name", [*OVERRIDDEN, *PUT_ASIDE, *OBEYED, "stop_strings"])
def test_null_asks_for_nothing(name, model):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f".*{name}", QcliWarning)
        assert len(written(model, {"max_length": len(PROMPT) + 2, "max_time": 60} | {name: None})) == (
            73 if name == "max_length" else 2
        )


WRONG = {
    "max_length": [-1, "20", 3.5, True],
    "max_new_tokens": [0, -3, "20", 2.0, [5]],
    "min_length": [-1, "a"],
    "min_new_tokens": [-1, {}],
    "max_time": ["long", float("nan")],
    "stop_strings": [5, [5], [""], "", {"a": 1}],
    "eos_token_id": ["</s>", ["</s>"], [1.5], 2**40, {}],
    "do_sample": ["yes", 1, [True]],
    "temperature": ["hot", -0.1, float("nan"), float("inf"), [1.0], True],
    "top_k": [-1, 5.5, "50"],
    "top_p": ["0.9", 1.5, -0.1, float("nan"), [0.9]],
    "min_p": [2, "x"],
    "top_h": [0, 1.1],
    "typical_p": [0, 7],
    "epsilon_cutoff": [-1, "x"],
    "eta_cutoff": [3, []],
    "repetition_penalty": [0, -1.0, "1.1", 10**400],
    "encoder_repetition_penalty": [0],
    "no_repeat_ngram_size": [-1, 1.5, 1 << 62],
    "encoder_no_repeat_ngram_size": ["2", 1 << 62],
    "bad_words_ids": [[], [[]], [5], [["a"]], [[-1]], "word"],
    "renormalize_logits": ["true"],
    "forced_bos_token_id": [-1, "a", 10_000],
    "forced_eos_token_id": ["a", [], 10_000],
    "remove_invalid_values": [1],
    "exponential_decay_length_penalty": [[1], "x", [1, "x"], [-1, 1.0], 3],
    "suppress_tokens": [5, "a", [["a"]], [0.5]],
    "begin_suppress_tokens": [5, [None], {}],
    "sequence_bias": [[], [[5, 1.0]], [[[5], "x"]], {"a": 1}, [[[10_000], 1.0]]],
    "guidance_scale": ["x", float("nan")],
    "watermarking_config": [5, "x", {"no_such": 1}, {"bias": "x"}, {"greenlist_ratio": 7}],
    "pad_token_id": [[3], "<pad>", 1.5],
    "bos_token_id": ["<s>", {}],
    "decoder_start_token_id": [-1, 10_000, "a"],
    "use_cache": ["no", 0],
}


@pytest.mark.parametrize("name, value", [(name, value) for name in WRONG for value in WRONG[name]])
def test_what_cannot_be_followed_is_refused_by_name(name, value, model):
    with pytest.raises(CheckpointError, match=f"{name}|watermark"):
        written(model, {name: value})


def test_every_obeyed_field_has_wrong_values():
    assert set(WRONG) == {*OBEYED, "stop_strings"}


def test_temperature_0_is_greedy(model, way):
    assert written(model, {"do_sample": True, "temperature": 0.0}) == written(model, {"temperature": 0}) == written(model, {})
    assert written(model, SAMPLED, temperature=0.0) == written(model, {})


def test_options_win_over_the_file(model, way):
    hot = written(model, {"temperature": 0.3}, temperature=1.5, top_k=40)
    assert hot == written(model, SAMPLED | {"top_k": 40})
    with pytest.warns(QcliWarning, match="sampling uses temperature 1"):
        assert written(model, {"temperature": 0}, top_p=0.9) == written(model, {"do_sample": True, "top_p": 0.9})
    assert len(written(model, {"max_length": 500, "max_new_tokens": 9}, max_new_tokens=4)) == 4


def test_a_maximum_length_that_the_prompt_has_reached_is_none(model):
    assert len(written(model, {"max_length": len(PROMPT), "eos_token_id": 5})) > 20


def test_a_least_length_beyond_the_limit(model, recwarn):
    assert len(written(model, {"min_new_tokens": 50})) == len(written(model, {"min_length": 5000})) == 20
    assert not recwarn.list


def test_stop_strings(model, way):
    """The text ends with the token that completes one, as in transformers."""
    free = written(model, {})
    tokenizer = model[2]
    stop = tokenizer.decode(free[:2])
    assert stop.isascii() and len(stop) == 2
    for stops in (stop, [stop, "no such text"]):
        assert written(model, {"stop_strings": stops}) == free[:2]
    _, loaded, _ = model
    loaded.generation_config.stop_strings = stop
    try:
        result = decode.generate(loaded, tokenizer, PROMPT, decode.Sampling(max_new_tokens=20), lambda token: None)
    finally:
        loaded.generation_config.stop_strings = None
    assert result.finished and result.token_ids == free[:2]


def test_ends_that_never_come(model):
    with pytest.warns(QcliWarning, match="token 999 should end a text.* 256 tokens"):
        assert written(model, {"eos_token_id": [999, -1]}) == written(model, {})


def test_warnings_come_once_in_a_conversation(model):
    _, loaded, tokenizer = model
    loaded.generation_config.num_beams = 4
    try:
        with pytest.warns(QcliWarning, match="num_beams"):
            decoding = decode.Decoding(loaded, tokenizer, decode.Sampling(max_new_tokens=2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                decoding.generate(PROMPT, lambda token: None)
        assert loaded.generation_config.num_beams == 4
    finally:
        loaded.generation_config.num_beams = None


def test_a_field_of_a_newer_transformers_is_handed_on(model):
    values = {"max_window_size": 24000, "chat_format": "chatml"}
    assert written(model, values) == written(model, {})


@pytest.mark.parametrize("name", ["validate", "to_dict", "update", "__class__", "streamer", "logits_processor", "_hash"])
def test_names_that_are_no_fields(name, model):
    assert written(model, {name: 5}) == written(model, {})


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "{", "\xff", "[" * 100_000])
def test_a_file_that_is_no_config(content, model):
    folder = model[0]
    (folder / "generation_config.json").write_bytes(content.encode("latin-1"))
    try:
        with pytest.raises(CheckpointError, match="generation_config.json"):
            qcli.load(str(folder), device="cpu")
    finally:
        (folder / "generation_config.json").unlink()


def test_a_byte_order_mark_is_no_fault(model):
    """transformers passes over such a file in silence."""
    folder = model[0]
    (folder / "generation_config.json").write_text('{"max_new_tokens": 7}', encoding="utf-8-sig")
    try:
        assert qcli.load(str(folder), device="cpu")[0].generation_config.max_new_tokens == 7
    finally:
        (folder / "generation_config.json").unlink()


def test_the_model_keeps_its_own_config(model):
    """What another caller of `generate` may want is not cleared away."""
    folder = model[0]
    (folder / "generation_config.json").write_text('{"num_beams": 4, "length_penalty": 2.0}')
    try:
        loaded, tokenizer = qcli.load(str(folder), device="cpu")
        with pytest.warns(QcliWarning, match="num_beams 4"):
            decode.generate(loaded, tokenizer, PROMPT, decode.Sampling(max_new_tokens=2), lambda token: None)
        assert loaded.generation_config.num_beams == 4 and loaded.generation_config.length_penalty == 2.0
    finally:
        (folder / "generation_config.json").unlink()


@pytest.mark.parametrize(
    "values", [{"num_return_sequences": 3}, {"early_stopping": []}, {"compile_config": {}}, {"num_return_sequences": "3"}]
)
def test_what_transformers_refuses_at_once_and_means_nothing_here(values, model):
    folder = model[0]
    (folder / "generation_config.json").write_text(json.dumps(values))
    try:
        assert qcli.load(str(folder), device="cpu")[0].generation_config.num_return_sequences is None
    finally:
        (folder / "generation_config.json").unlink()


def test_the_command_refuses_before_it_loads(model, quick_cli, monkeypatch):
    folder = model[0]
    (folder / "generation_config.json").write_text('{"top_p": "0.9", "top_k": -1}')
    monkeypatch.setattr(qcli.loading.load, "load", None)
    try:
        done = quick_cli("generate", folder, "hi")
    finally:
        (folder / "generation_config.json").unlink()
    assert done.returncode == 1 and 'top_p is "0.9", expected a number from 0 to 1; top_k is -1' in done.stderr


def test_a_config_of_old_holds_rules_too(model, quick_cli):
    folder = model[0]
    config = json.loads((folder / "config.json").read_text())
    kept = (folder / "config.json").read_text()
    try:
        (folder / "config.json").write_text(json.dumps(config | {"top_k": "many"}))
        done = quick_cli("generate", folder, "hi")
        assert done.returncode == 1 and "config.json" in done.stderr and 'top_k is "many"' in done.stderr
        (folder / "config.json").write_text(json.dumps(config | {"num_beams": 2, "max_length": 9}))
        done = quick_cli("generate", folder, "hello", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["new_tokens"] == 4, done.stderr
    finally:
        (folder / "config.json").write_text(kept)
