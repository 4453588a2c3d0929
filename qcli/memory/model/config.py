"""A model's config.json, read with transformers' names, aliases and defaults, and without transformers.

Configs differ by family and by age. The layer count has six names, and a null means absent. The text part of a multimodal config
holds only what differs from its class's defaults. Those defaults are facts about transformers 5, kept in class_defaults.json, one
line a model_type. `ModelConfig.assumed` has a sentence for every default that was taken.
"""

import functools
import json
from pathlib import Path

from qcli.errors import UsageError
from qcli.memory.model import context, layer_types

REQUIRED = object()
_SUB_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
_LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers", "n_layers", "decoder_layers")
_HIDDEN = ("hidden_size", "n_embd", "d_model", "n_embed", "emb_dim")
_HEADS = (
    "num_attention_heads",
    "n_head",
    "num_heads",
    "n_heads",
    "attention_heads",
    "decoder_attention_heads",
    "num_decoder_attention_heads",
)
_VOCABULARY = ("vocab_size", "padded_vocab_size", "tgt_vocab_size")
_CONTEXT = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length", "context_length")
_LARGEST = 1 << 48  # of any size or count; a larger one means a damaged file
_MOST_LAYERS = 10_000  # more means a damaged file; counting layer by layer would then take hours
# A whole config always has these. If one is missing, the file is damaged. If another field is missing, the file is old.
_NEVER_ASSUMED = frozenset(_LAYERS + _HIDDEN + _HEADS + _VOCABULARY)


@functools.cache
def class_defaults() -> dict[str, dict]:
    """model_type -> the fields that affect memory, with their defaults in transformers 5's configuration class."""
    return json.loads(Path(__file__).with_name("class_defaults.json").read_text())


class ModelConfig:
    """View of a config.json. Sizes are in elements, counts are integers. Nothing but `raw` is read.

    `raw` is the parsed file. `label` is its name in messages ("config.json of org/name"). `.text` is the sub-config of the language
    model, or `raw` where there is none. Properties raise UsageError where a field is missing or has the wrong type; the message
    names the field and `label`.
    """

    def __init__(self, raw: dict, label: str):
        if not isinstance(raw, dict):
            raise UsageError(f"{label} holds {type(raw).__name__}, expected a JSON object.")
        self.raw = raw
        self.label = label
        self.text = _language_model(raw)
        self.assumed: list[str] = []
        self.model_type = self._model_type()

    def _model_type(self) -> str:
        own, outer = self.text.get("model_type"), self.raw.get("model_type")
        if own is None and outer is not None and self.text is not self.raw:
            own = f"{outer}_text" if f"{outer}_text" in class_defaults() else outer
        if own is None:
            raise UsageError(f"{self.label} has no model_type.", "Is it the config.json of a transformers model?")
        return str(own)

    def get(self, *names: str, default=REQUIRED):
        """The first of `names` that is present and not null. Otherwise the class's default for an absent one, noted in `assumed`.
        Otherwise `default`. Raises UsageError where there is none of these."""
        for name in names:
            if self.text.get(name) is not None:
                return self.text[name]
        if not any(name in self.text for name in names):
            for name in names:
                known = class_defaults().get(self.model_type, {}).get(name)
                if known is not None and (name not in _NEVER_ASSUMED or self.text is not self.raw):
                    self.assume(f"{name} is not in {self.label}: {known}, the default of {self.model_type}.")
                    return known
        if default is REQUIRED:
            also = f" (nor {', '.join(names[1:])})" if names[1:] else ""
            raise UsageError(f"{self.label} has no {names[0]}{also}.", "Complete the file, or name the model's folder or hub id.")
        return default

    def integer(self, *names: str, default=REQUIRED) -> int:
        """`get`, checked to be a whole number of at least 0. A list with a number for each layer gives the largest."""
        value = self.get(*names, default=default)
        if isinstance(value, list) and value and all(type(item) is int for item in value):
            value = max(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is default:
            return value
        if type(value) is int and value > _LARGEST:
            raise UsageError(f"{names[0]} in {self.label} is {value:,}, expected at most {_LARGEST:,}.")
        if type(value) is not int or value < 0:
            raise UsageError(f"{names[0]} in {self.label} is {value!r}, expected a whole number.")
        return value

    def listed(self, name: str) -> list:
        """The list `name`, empty where it is absent. Raises UsageError where it is no list."""
        value = self.get(name, default=[])
        if not isinstance(value, list):
            raise UsageError(f"{name} in {self.label} is {value!r}, expected a list.")
        return value

    def nested(self, name: str, field: str):
        """`field` of the object `name`, None where either is absent. Raises UsageError where `name` is no object."""
        inner = self.get(name, default=None)
        if inner is not None and not isinstance(inner, dict):
            raise UsageError(f"{name} in {self.label} is {inner!r}, expected an object.")
        return None if inner is None else inner.get(field)

    def assume(self, sentence: str) -> None:
        """Notes a default that was taken, once."""
        if sentence not in self.assumed:
            self.assumed.append(sentence)

    @property
    def architecture(self) -> str:
        """The model class that the file names, such as "LlamaForCausalLM"; "" where it names none."""
        named = self.raw.get("architectures") or self.text.get("architectures") or [""]
        return str(named[0])

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.get("is_encoder_decoder", default=False))

    @property
    def layers(self) -> int:
        """Layers of the language model. Where there is an encoder too, those of the decoder."""
        listed = self.text.get("layers_block_type") or self.text.get("hybrid_override_pattern")
        if listed and self.model_type == "nemotron_h":  # which ignores num_hidden_layers
            return len(listed)
        if self.model_type == "longcat_flash":
            # A layer has two attention blocks, and transformers counts each. 5.17 wrote a num_hidden_layers that means nothing.
            return 2 * self._depth("num_layers")
        return self._depth(*(("decoder_layers", "num_decoder_layers", *_LAYERS) if self.is_encoder_decoder else _LAYERS))

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder, 0 where there is none."""
        return self._depth("encoder_layers", "num_layers") if self.is_encoder_decoder else 0

    def _depth(self, *names: str) -> int:
        count = self.positive(*names)
        if count > _MOST_LAYERS:
            raise UsageError(f"{names[0]} in {self.label} is {count:,}, expected at most {_MOST_LAYERS:,}.")
        return count

    @property
    def hidden_size(self) -> int:
        return self.positive(*_HIDDEN)

    @property
    def heads(self) -> int:
        return self.positive(*_HEADS)

    @property
    def kv_heads(self) -> int:
        """Key and value heads of a layer: 1 under multi-query attention, `heads` without grouping."""
        if self.model_type in ("falcon", "gpt_bigcode"):
            grouped = self.get("new_decoder_architecture", default=False)
            if not grouped and self.get("multi_query", default=self.model_type == "gpt_bigcode"):
                return 1
        if self.get("multi_query_attention", default=False):
            return self.positive("multi_query_group_num")
        nested = self.nested("attn_config", "kv_n_heads")
        return nested or self.integer("num_key_value_heads", "num_kv_heads", default=None) or self.heads

    @property
    def head_dim(self) -> int:
        """Width of a query and key head."""
        if self.get("kv_lora_rank", default=None) is not None:
            return self.integer("qk_nope_head_dim") + self.integer("qk_rope_head_dim")
        given = self.get("head_dim", "kv_channels", "d_kv", "attention_head_dim", default=None)
        if given is None:
            doubled = 2 if self.model_type in ("zamba", "zamba2") else 1
            width = self.integer("attention_hidden_size", default=doubled * self.hidden_size)
            if width < self.heads:
                raise UsageError(f"{self.label} has {self.heads:,} attention heads for a width of {width:,}", "Mend the file.")
            return width // self.heads
        return self.positive("head_dim", "kv_channels", "d_kv", "attention_head_dim")

    @property
    def value_head_dim(self) -> int:
        """Width of a value head. Under MLA and in MiMo it differs from that of a key."""
        latent = self.get("kv_lora_rank", default=None) is not None
        return self.integer("v_head_dim", default=None) or (self.hidden_size // self.heads if latent else self.head_dim)

    @property
    def intermediate_size(self) -> int:
        """Width of the dense feed-forward layer. Where layers differ, the widest."""
        nested = self.nested("ffn_config", "ffn_hidden_size")
        width = nested or self.integer("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", default=None)
        return width or int(self.get("expansion_ratio", default=4) * self.hidden_size)

    @property
    def vocab_size(self) -> int:
        return self.positive(*_VOCABULARY)

    @property
    def max_context(self) -> int | None:
        """Tokens of the longest sequence that the model was made for, rope scaling included. None where the file sets no limit
        (ALiBi, T5, Mamba)."""
        return context.extended(self, self.integer(*_CONTEXT, default=None))

    @property
    def tied_embeddings(self) -> bool:
        """Whether the output head is the embedding. The outer config overrules the inner one, as in transformers."""
        for part in (self.raw, self.text):
            if part.get("tie_word_embeddings") is not None:
                return bool(part["tie_word_embeddings"])
        return bool(self.get("tie_embedding", "tie_word_embeddings", default=self.model_type in ("t5", "mt5", "umt5")))

    @property
    def dtype(self) -> str:
        """The dtype in which the weights are stored, by torch's name, such as "bfloat16"."""
        for part in (self.raw, self.text):
            named = part.get("dtype") or part.get("torch_dtype")
            if named is not None:
                return str(named).removeprefix("torch.")
        self.assume(f"dtype is not in {self.label}: bfloat16.")
        return "bfloat16"

    @property
    def quantization(self) -> dict | None:
        """The `quantization_config` of a model that is stored quantized; None of any other."""
        return self.raw.get("quantization_config") or self.text.get("quantization_config")

    @functools.cached_property
    def layer_types(self) -> list[str]:
        """Each layer's kind, in the words of transformers 5: full_attention, sliding_attention, chunked_attention,
        indexed_attention, linear_attention, conv, hybrid, moe, mlp... Every recurrent layer (Mamba, DeltaNet, lightning) is a
        linear_attention."""
        return layer_types.of(self)

    @property
    def sliding_window(self) -> int | None:
        """How many tokens a sliding or chunked layer attends to, or None."""
        if self.get("use_sliding_window", default=True) is False:
            return None
        if "chunked_attention" in self.layer_types:
            return self.positive("attention_chunk_size")
        return layer_types.window(self)

    @property
    def num_experts(self) -> int:
        """Routed experts of a mixture layer, 0 in a dense model."""
        nested = self.nested("ffn_config", "moe_num_experts")
        return nested or self.integer(*layer_types.EXPERTS, default=0)

    @property
    def experts_per_token(self) -> int:
        """Routed experts that each token uses, 0 in a dense model."""
        if not self.num_experts:
            return 0
        return self.nested("ffn_config", "moe_top_k") or self.positive(*layer_types.PER_TOKEN)

    @property
    def moe_intermediate_size(self) -> int:
        """Width of one routed expert."""
        return self.integer("moe_intermediate_size", "expert_ffn_hidden_size", default=None) or self.intermediate_size

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` holds routed experts."""
        return bool(self.num_experts) and layer_types.holds_experts(self, index)

    def positive(self, *names: str, default=REQUIRED) -> int:
        """`integer`, checked to be at least 1."""
        value = self.integer(*names, default=default)
        if value == 0:
            raise UsageError(f"{names[0]} in {self.label} is 0, expected at least 1.")
        return value


def _language_model(raw: dict) -> dict:
    """The sub-config with the language model's layer count; `raw` where there is none."""
    for name in _SUB_CONFIGS:
        inner = raw.get(name)
        if isinstance(inner, dict):
            inner = _language_model(inner)
            if any(inner.get(field) is not None for field in _LAYERS) or not any(raw.get(f) is not None for f in _LAYERS):
                return inner
    return raw
