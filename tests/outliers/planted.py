"""Small models whose outlier features are planted by a change that leaves their function as it was."""

import copy

import torch
import transformers

from tests.models import add_tokenizer

HIDDEN, LAYERS = 64, 4


def small_llama() -> transformers.LlamaForCausalLM:
    """A random Llama in float32, with norms that are not all ones."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def plant(model, gains: dict[int, float], layers=range(LAYERS)):
    """A copy that scales the norms' gains of these dimensions up, and the weights that read them down: the same function."""
    planted = copy.deepcopy(model)
    with torch.no_grad():
        for layer in layers:
            block = planted.model.layers[layer]
            readers = (
                (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
            )
            for norm, linears in readers:
                for dim, gain in gains.items():
                    norm.weight[dim] *= gain
                    for linear in linears:
                        linear.weight[:, dim] /= gain
    return planted


def save(model, folder):
    """The model with a byte-level tokenizer in `folder`."""
    model.save_pretrained(folder)
    add_tokenizer(folder)
    return folder


def write_text(path, characters: int = 1000):
    """ASCII of a seeded generator: the tokenizer makes one token of each character."""
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (characters,), generator=generator).tolist()
    path.write_text("".join(map(chr, letters)))
    return path


def recorded_inputs(model, windows) -> dict[str, torch.Tensor]:
    """Float64 inputs of every linear layer over `windows`, each run by itself: name -> [tokens, channels]."""
    seen: dict[str, list[torch.Tensor]] = {}

    def note(name):
        return lambda module, args: seen.setdefault(name, []).append(args[0][0].double())

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    handles = [module.register_forward_pre_hook(note(name)) for name, module in linears.items()]
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.tensor([list(window)]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}
