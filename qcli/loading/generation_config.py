"""The generation config of a model, field by field: which values are valid, and what qcli does with them.

qcli writes one text and shows each token at once. A field that asks for something else is overridden with a warning. A field
without effect on such a text is ignored without a warning. All other fields are followed, by transformers' own rules. An invalid
value is refused before it is used. The fields are those of transformers 5.17 to 5.24 (`transformers.GenerationConfig`). A field
that a newer transformers adds is passed on unchanged.
"""

import copy
import warnings
from dataclasses import dataclass

from qcli.checkpoint.source import Source
from qcli.errors import CheckpointError, QcliWarning, first_line
from qcli.loading.generation_values import (
    ANY,
    COUNT,
    DECAY,
    FLAG,
    ID,
    ID_LISTS,
    IDS,
    NGRAM,
    NUMBER,
    POSITIVE,
    POSITIVE_NUMBER,
    SEQUENCE_BIAS,
    SHARE,
    SHARE_ABOVE_0,
    TEMPERATURE,
    TEXTS,
    TOKEN,
    TOKEN_LIST,
    TOKENS,
    WATERMARK,
    Kind,
    spelled,
)

FILE = "generation_config.json"


@dataclass(frozen=True)
class Field:
    """`kind` describes the valid values. None (null in JSON) always means "not set".

    A field with a `why` is overridden: its value becomes `instead`, with a warning unless the value is in `idle` (values that ask
    for nothing). A field that is `unused` is ignored without a warning. All others are followed.
    """

    kind: Kind
    why: str = ""
    instead: object = None
    idle: tuple = (None, False, 0)
    unused: bool = False


_ONE = (None, 1)
_UNUSED = Field(ANY, unused=True)
_ASSISTED = "the model itself chooses each token, without assisted generation"
_BEAMS = "tokens are chosen one at a time, without beams"
_WORDS = "no words are forced into the text"

FIELDS: dict[str, Field] = {
    # how long the text becomes
    "max_length": Field(COUNT),
    "max_new_tokens": Field(POSITIVE),
    "min_length": Field(COUNT),
    "min_new_tokens": Field(COUNT),
    "max_time": Field(NUMBER),
    "stop_strings": Field(TEXTS),
    "eos_token_id": Field(TOKENS),
    # how a token is chosen
    "do_sample": Field(FLAG),
    "temperature": Field(TEMPERATURE),
    "top_k": Field(COUNT),
    "top_p": Field(SHARE),
    "min_p": Field(SHARE),
    "top_h": Field(SHARE_ABOVE_0),
    "typical_p": Field(SHARE_ABOVE_0),
    "epsilon_cutoff": Field(SHARE),
    "eta_cutoff": Field(SHARE),
    "repetition_penalty": Field(POSITIVE_NUMBER),
    "encoder_repetition_penalty": Field(POSITIVE_NUMBER),
    "no_repeat_ngram_size": Field(NGRAM),
    "encoder_no_repeat_ngram_size": Field(NGRAM),
    "bad_words_ids": Field(ID_LISTS),
    "renormalize_logits": Field(FLAG),
    "forced_bos_token_id": Field(ID),
    "forced_eos_token_id": Field(IDS),
    "remove_invalid_values": Field(FLAG),
    "exponential_decay_length_penalty": Field(DECAY),
    "suppress_tokens": Field(TOKEN_LIST),
    "begin_suppress_tokens": Field(TOKEN_LIST),
    "sequence_bias": Field(SEQUENCE_BIAS),
    "guidance_scale": Field(NUMBER),
    "watermarking_config": Field(WATERMARK),
    # tokens with a meaning
    "pad_token_id": Field(TOKEN),
    "bos_token_id": Field(TOKENS),
    "decoder_start_token_id": Field(IDS),
    # the cache
    "use_cache": Field(FLAG),
    "cache_implementation": Field(ANY, "the default cache is used, which grows with the text", idle=(None, "dynamic", "hybrid")),
    "cache_config": _UNUSED,
    "max_cache_len": _UNUSED,
    "prefill_chunk_size": Field(ANY, "the prompt is read in one piece"),
    # other ways to search for a text
    "num_beams": Field(ANY, _BEAMS, 1, _ONE),
    "num_beam_groups": Field(ANY, _BEAMS, 1, _ONE),
    "num_return_sequences": Field(ANY, "one text is written", 1, _ONE),
    "penalty_alpha": Field(ANY, "tokens are chosen without contrastive search"),
    "dola_layers": Field(ANY, "layers are not contrasted (DoLa)", idle=(None,)),
    "constraints": Field(ANY, _WORDS, idle=(None, [])),
    "force_words_ids": Field(ANY, _WORDS, idle=(None, [])),
    "token_healing": Field(ANY, "the prompt is read unchanged"),
    "use_mtp": Field(ANY, _ASSISTED),
    "prompt_lookup_num_tokens": Field(ANY, _ASSISTED, idle=(None,)),
    "assistant_early_exit": Field(ANY, _ASSISTED, idle=(None,)),
    "speculation_type": Field(ANY, _ASSISTED),
    "early_stopping": _UNUSED,
    "length_penalty": _UNUSED,
    "diversity_penalty": _UNUSED,
    "low_memory": _UNUSED,
    "is_assistant": _UNUSED,
    "num_assistant_tokens": _UNUSED,
    "num_assistant_tokens_schedule": _UNUSED,
    "assistant_confidence_threshold": _UNUSED,
    "assistant_lookbehind": _UNUSED,
    "target_lookbehind": _UNUSED,
    "assistant_ensemble_weight": _UNUSED,
    "max_matching_ngram_size": _UNUSED,
    # what else transformers could return, and how it runs
    "output_attentions": _UNUSED,
    "output_hidden_states": _UNUSED,
    "output_scores": _UNUSED,
    "output_logits": _UNUSED,
    "return_dict_in_generate": _UNUSED,
    "compile_config": Field(ANY, "nothing is compiled", idle=(None,)),
    "disable_compile": _UNUSED,
    "continuous_batching_config": _UNUSED,
    "transformers_version": _UNUSED,
}

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""Fields without effect where tokens are not drawn at random."""

_BELOW_VOCABULARY = ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias", "decoder_start_token_id")


def check(values: dict, label: str, vocabulary: int | None = None) -> None:
    """Raises CheckpointError that names every field of `values` with an invalid value.

    Messages call the file `label`. If `vocabulary` (a count of tokens) is given, the ids that the rules use must be below it.
    """
    wrong = []
    for name, value in values.items():
        field = FIELDS.get(name)
        if field is None or value is None:
            continue
        if not field.kind.holds(value):
            wrong.append(f"{name} is {spelled(value)}, expected {field.kind.expected}")
        elif vocabulary is not None and name in _BELOW_VOCABULARY:
            beyond = [i for i in _ids(value) if i >= vocabulary]
            if beyond:
                wrong.append(f"{name} names token {beyond[0]}, expected one below {vocabulary:,}, the size of the vocabulary")
    if wrong:
        raise CheckpointError(f"{label}: {'; '.join(wrong)}", f"Mend it, or remove the field from {FILE}.")


def _ids(value) -> list[int]:
    """Every token id in a field's value, however deep."""
    if type(value) is int:
        return [value]
    if isinstance(value, dict):
        return [i for key in value for i in _ids(key)]
    return [i for item in value for i in _ids(item)] if isinstance(value, (list, tuple)) else []


def cleared(config):
    """(a copy of a transformers GenerationConfig that asks for one text, token by token; a sentence for each overridden field)."""
    clear = copy.deepcopy(config)
    notes = _notes({name: getattr(clear, name, None) for name in FIELDS})
    for name, field in FIELDS.items():
        value = getattr(clear, name, None)
        if field.why or field.unused:
            _put(clear, name, field.instead)
        elif field.kind in (NUMBER, POSITIVE_NUMBER, SHARE, SHARE_ABOVE_0, TEMPERATURE) and value is not None:
            setattr(clear, name, float(value))  # some rules of transformers accept no int
    if isinstance(getattr(clear, "sequence_bias", None), list):
        clear.sequence_bias = [[list(ids), float(bias)] for ids, bias in clear.sequence_bias]
    return clear, notes


def _notes(values: dict) -> list[str]:
    """A sentence for each value that is overridden."""
    notes = []
    for name, value in values.items():
        field = FIELDS.get(name)
        if field is None or not field.why:
            continue
        if not any(value is idle or (type(value) is type(idle) and value == idle) for idle in field.idle):
            notes.append(f"the generation config has {name} {spelled(value)}: {field.why}")
    return notes


def _put(config, name: str, value: object) -> None:
    if hasattr(config, name):
        setattr(config, name, value)


def check_source(source: Source) -> None:
    """Checks the generation config of a checkpoint. Raises CheckpointError, HubError."""
    values, label = _stated(source)
    check(values, label)


def for_loading(source: Source, config):
    """The generation config that from_pretrained gets for a model with this `config`. None if the checkpoint states nothing.

    transformers refuses some values and combinations when it loads a model, and silently skips a file that it cannot parse.
    This function drops the fields that have no effect on one text. It raises CheckpointError for other faults.
    """
    from transformers import GenerationConfig

    values, label = _stated(source)
    if not values:
        return None
    if FILE not in source.place.names:  # a composite model keeps the ids of its language model in a sub-config
        derived = GenerationConfig.from_model_config(config).to_dict()
        values = {name: value for name, value in derived.items() if value is not None} | values
    taken = {name: value for name, value in values.items() if not _reserved(GenerationConfig, name)}
    try:
        return GenerationConfig.from_dict(dict(taken))
    except Exception:  # of any type: transformers checks some values and fails on others
        check(values, label)
        without = {n: v for n, v in taken.items() if n not in FIELDS or not (FIELDS[n].why or FIELDS[n].unused)}
        try:
            config = GenerationConfig.from_dict(without)
        except Exception as e:
            raise CheckpointError(f"{label}: transformers refuses it: {first_line(e)}", "Mend it, or remove it.") from e
        for note in _notes(taken):
            warnings.warn(note, QcliWarning, stacklevel=3)
        return config


def _stated(source: Source) -> tuple[dict, str]:
    """(the fields stated, the file that states them): generation_config.json, or an old config.json if there is none."""
    if FILE in source.place.names:
        return source.json(FILE), f"{FILE} of {source.label}"
    found = {name: value for name, value in source.config.items() if name in FIELDS and value is not None}
    return found, f"config.json of {source.label}"


def _reserved(config_class: type, name: str) -> bool:
    """Whether a field of this name would hide an attribute of the class, or is an argument of `generate`, not a field."""
    arguments = (
        "logits_processor",
        "stopping_criteria",
        "prefix_allowed_tokens_fn",
        "synced_gpus",
        "assistant_model",
        "streamer",
        "negative_prompt_ids",
        "negative_prompt_attention_mask",
    )
    return name in arguments or hasattr(config_class, name) or (name.startswith("_") and name != "_from_model_config")
