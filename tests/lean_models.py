"""Small models of many architectures with random weights, and their texts by transformers' step and by the lean step."""

import torch
import transformers as t

from qcli.generation import lean

BASE = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
WIDE = {"head_dim": 32}
WINDOW = {"sliding_window": 9}
NEOX = {name: value for name, value in BASE.items() if name != "num_key_value_heads"}
GPT2 = {"vocab_size": 199, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}
MODELS = {
    "llama": BASE,
    "mistral": BASE | WINDOW,
    "ministral": BASE | WINDOW | WIDE,
    "qwen2": BASE,
    "qwen3": BASE | WIDE,
    "gemma": BASE | WIDE,
    "gemma2": BASE | WIDE | WINDOW | {"query_pre_attn_scalar": 20},
    "gemma3_text": BASE | WIDE | WINDOW | {"query_pre_attn_scalar": 20, "sliding_window_pattern": 2},
    "vaultgemma": BASE | WIDE | WINDOW | {"query_pre_attn_scalar": 20},
    "phi3": BASE,
    "phi": BASE,
    "smollm3": BASE | {"no_rope_layers": [1, 0, 1]},
    "granite": BASE | {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 4.0, "attention_multiplier": 0.1},
    "olmo": BASE,
    "olmo2": BASE,
    "olmo3": BASE | WINDOW,
    "stablelm": BASE | {"use_qkv_bias": True},
    "stablelm-parallel": BASE | {"use_parallel_residual": True},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neox": NEOX,
    "gpt_neox-sequential": NEOX | {"use_parallel_residual": False},
    "starcoder2": BASE | WINDOW,
    "cohere": BASE,
    "cohere2": BASE | WINDOW,
    "glm": BASE | WIDE,
    "glm4": BASE | WIDE,
    "helium": BASE | {"head_dim": 16},
    "ernie4_5": BASE,
    "exaone4": BASE | WINDOW,
    "arcee": BASE,
    "nemotron": BASE,
    "seed_oss": BASE | WIDE,
}
# What is not recognised: experts, other names, positions inside attention, norms after the rotation.
OTHERS = {
    "mixtral": BASE | {"num_local_experts": 2},
    "opt": {"vocab_size": 199, "hidden_size": 64, "ffn_dim": 112, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gptj": {"vocab_size": 199, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "hunyuan_v1_dense": BASE | WIDE,
}


def small(name: str, dtype=torch.float32, **sizes):
    """A model with random weights, random norms and biases among them."""
    torch.manual_seed(0)
    config = t.AutoConfig.for_model(name.split("-")[0], **sizes, bos_token_id=1, eos_token_id=None)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                weight += 0.3 * drawn
            else:
                embedded = 0.15 if "gemma" in name else 0.5  # Gemma scales its embeddings
                weight.copy_(drawn * weight.shape[-1] ** -0.5 * (embedded if "embed" in path or "wte" in path else 1.2))
    return model.to(dtype)


def prompt_of(tokens: int) -> torch.Tensor:
    return torch.randint(3, 199, (1, tokens), generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def theirs(model, ids, **options) -> list[int]:
    made = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options)
    return made[0, ids.shape[1] :].tolist()


@torch.inference_mode()
def ours(model, ids, stepped=None, **options) -> list[int]:
    made: list[int] = []
    stepped = stepped or lean.Lean(model)
    lean.generate(model, ids, stepped, made.append, lambda: None, eos_token_id=None, pad_token_id=0, **options)
    return made
