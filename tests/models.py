"""Tiny random models of many architectures, made on the spot."""

import torch
import transformers as t

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 64}


# name -> (class, config, linear modules that transformers with bitsandbytes converts)
ARCHITECTURES = {
    "llama": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**_SMALL), 14),
    "mistral": (t.MistralForCausalLM, lambda: t.MistralConfig(**_SMALL), 14),
    "qwen2": (t.Qwen2ForCausalLM, lambda: t.Qwen2Config(**_SMALL), 14),
    "qwen3": (t.Qwen3ForCausalLM, lambda: t.Qwen3Config(**_SMALL, head_dim=16), 14),
    "gemma2": (t.Gemma2ForCausalLM, lambda: t.Gemma2Config(**_SMALL, head_dim=16), 14),
    "gemma3_text": (t.Gemma3ForCausalLM, lambda: t.Gemma3TextConfig(**_SMALL, head_dim=16), 14),
    "phi3": (t.Phi3ForCausalLM, lambda: t.Phi3Config(**_SMALL, pad_token_id=0), 8),
    "gpt2": (t.GPT2LMHeadModel, lambda: t.GPT2Config(**_GPT), 8),
    "opt": (
        t.OPTForCausalLM,
        lambda: t.OPTConfig(
            hidden_size=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=64,
            word_embed_proj_dim=64,
        ),
        12,
    ),
    "gpt_neox": (
        t.GPTNeoXForCausalLM,
        lambda: t.GPTNeoXConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=256,
            max_position_embeddings=64,
        ),
        8,
    ),
    "gptj": (t.GPTJForCausalLM, lambda: t.GPTJConfig(**_GPT, rotary_dim=8), 12),
    "bloom": (t.BloomForCausalLM, lambda: t.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=256), 8),
    "starcoder2": (t.Starcoder2ForCausalLM, lambda: t.Starcoder2Config(**_SMALL), 12),
    "mixtral": (t.MixtralForCausalLM, lambda: t.MixtralConfig(**_SMALL, num_local_experts=4), 8),
    "t5": (
        t.T5ForConditionalGeneration,
        lambda: t.T5Config(d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4, vocab_size=256),
        28,
    ),
    "stablelm": (t.StableLmForCausalLM, lambda: t.StableLmConfig(**_SMALL), 14),
    "olmo2": (t.Olmo2ForCausalLM, lambda: t.Olmo2Config(**_SMALL), 14),
    "cohere": (t.CohereForCausalLM, lambda: t.CohereConfig(**_SMALL), 14),
}


def make_model(name: str, folder, dtype: torch.dtype = torch.bfloat16, **save) -> torch.nn.Module:
    """Saves a random model of an architecture to `folder` and returns it."""
    torch.manual_seed(0)
    model_class, config, _ = ARCHITECTURES[name]
    model = model_class(config()).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as constants, which would hide mistakes
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **save)
    return model


def make_tied(name: str, folder, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """`make_model` of an architecture with its embeddings tied."""
    torch.manual_seed(0)
    model_class, config, _ = ARCHITECTURES[name]
    model = model_class(type(config())(**config().to_dict() | {"tie_word_embeddings": True})).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def add_tokenizer(folder) -> None:
    """Puts a byte-level tokenizer of at most 256 ids beside a model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet[:254])} | {"<s>": 254, "</s>": 255}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=alphabet[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def example_inputs(model) -> dict[str, torch.Tensor]:
    """Inputs for one forward pass."""
    ids = torch.arange(1, 17)[None]
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
