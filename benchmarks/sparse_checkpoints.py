"""Checkpoints in the full shapes of large models as sparse files: their headers are real, their data are holes.

    python benchmarks/sparse_checkpoints.py FOLDER [deepseek-v3|llama-405b ...]

What reads headers alone, as a plan does, sees the model. 671 billion parameters take 22 MB of disk. Shapes are those of the
published config.json files.
"""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
_SHARD = 4_300_000_000  # bytes of a file, as both are published
Tensor = tuple[str, str, list[int]]  # name, dtype, shape


def deepseek_v3(layers: int = 61, experts: int = 256) -> tuple[dict, Iterator[Tensor]]:
    """DeepSeek-V3 as it is published: FP8 with a scale for each block of 128 x 128."""
    hidden, heads, vocabulary, dense = 7168, 128, 129280, 3
    config = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": hidden,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "n_shared_experts": 1,
        "n_routed_experts": experts,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": dense,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
    }

    def linear(name: str, rows: int, columns: int) -> Iterator[Tensor]:
        yield f"{name}.weight", "F8_E4M3", [rows, columns]
        yield f"{name}.weight_scale_inv", "F32", [-(-rows // 128), -(-columns // 128)]

    def mlp(name: str, width: int) -> Iterator[Tensor]:
        yield from linear(f"{name}.gate_proj", width, hidden)
        yield from linear(f"{name}.up_proj", width, hidden)
        yield from linear(f"{name}.down_proj", hidden, width)

    def tensors() -> Iterator[Tensor]:
        yield "model.embed_tokens.weight", "BF16", [vocabulary, hidden]
        for layer in range(layers):
            block = f"model.layers.{layer}"
            yield f"{block}.input_layernorm.weight", "BF16", [hidden]
            yield f"{block}.post_attention_layernorm.weight", "BF16", [hidden]
            yield from linear(f"{block}.self_attn.q_a_proj", 1536, hidden)
            yield f"{block}.self_attn.q_a_layernorm.weight", "BF16", [1536]
            yield from linear(f"{block}.self_attn.q_b_proj", heads * 192, 1536)
            yield from linear(f"{block}.self_attn.kv_a_proj_with_mqa", 576, hidden)
            yield f"{block}.self_attn.kv_a_layernorm.weight", "BF16", [512]
            yield from linear(f"{block}.self_attn.kv_b_proj", heads * 256, 512)
            yield from linear(f"{block}.self_attn.o_proj", hidden, heads * 128)
            if layer < dense:
                yield from mlp(f"{block}.mlp", 18432)
                continue
            yield f"{block}.mlp.gate.weight", "BF16", [experts, hidden]
            yield f"{block}.mlp.gate.e_score_correction_bias", "F32", [experts]
            for expert in range(experts):
                yield from mlp(f"{block}.mlp.experts.{expert}", 2048)
            yield from mlp(f"{block}.mlp.shared_experts", 2048)
        yield "model.norm.weight", "BF16", [hidden]
        yield "lm_head.weight", "BF16", [vocabulary, hidden]

    return config, tensors()


def llama_405b(layers: int = 126) -> tuple[dict, Iterator[Tensor]]:
    """Llama-3.1-405B, bfloat16."""
    hidden, width, heads, kv_heads, vocabulary = 16384, 53248, 128, 8, 128256
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes = {
        "self_attn.q_proj": [hidden, hidden],
        "self_attn.k_proj": [kv_heads * 128, hidden],
        "self_attn.v_proj": [kv_heads * 128, hidden],
        "self_attn.o_proj": [hidden, hidden],
        "mlp.gate_proj": [width, hidden],
        "mlp.up_proj": [width, hidden],
        "mlp.down_proj": [hidden, width],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }

    def tensors() -> Iterator[Tensor]:
        yield "model.embed_tokens.weight", "BF16", [vocabulary, hidden]
        for layer in range(layers):
            for name, shape in shapes.items():
                yield f"model.layers.{layer}.{name}.weight", "BF16", shape
        yield "model.norm.weight", "BF16", [hidden]
        yield "lm_head.weight", "BF16", [vocabulary, hidden]

    return config, tensors()


SHAPES = {"deepseek-v3": deepseek_v3, "llama-405b": llama_405b}


def write(folder: Path, config: dict, tensors: Iterator[Tensor]) -> Path:
    """Writes the sparse checkpoint into a new folder."""
    folder.mkdir(parents=True)
    files: list[list[tuple[str, str, list[int], int]]] = [[]]
    size = 0
    for name, dtype, shape in tensors:
        count = _BYTES[dtype]
        for n in shape:
            count *= n
        if files[-1] and size + count > _SHARD:
            files.append([])
            size = 0
        files[-1].append((name, dtype, shape, count))
        size += count
    index = {}
    for number, held in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, dtype, shape, count in held:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + count]}
            at += count
            index[name] = file
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as opened:
            opened.write(struct.pack("<Q", len(raw)) + raw)
            opened.truncate(8 + len(raw) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    for wanted in sys.argv[2:] or SHAPES:
        print(write(Path(sys.argv[1]) / wanted, *SHAPES[wanted]()))
