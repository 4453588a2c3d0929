"""Writes a Llama checkpoint with random bfloat16 weights, of any size, without ever keeping it in memory.

    python benchmarks/make_checkpoint.py FOLDER --layers 32 --hidden 4096 --intermediate 14336 --vocabulary 32000

The default shapes are those of an 8B model with fewer layers. Shards have 5 GB.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from qcli.checkpoint.safetensors_file import build_header
from qcli.sizes import parse_size

CHUNK = 1 << 22  # elements


def tensors(layers: int, hidden: int, intermediate: int, vocabulary: int, kv: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor of an untied Llama."""
    found = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for i in range(layers):
        layer = f"model.layers.{i}"
        found += [
            (f"{layer}.input_layernorm.weight", (hidden,)),
            (f"{layer}.self_attn.q_proj.weight", (hidden, hidden)),
            (f"{layer}.self_attn.k_proj.weight", (kv, hidden)),
            (f"{layer}.self_attn.v_proj.weight", (kv, hidden)),
            (f"{layer}.self_attn.o_proj.weight", (hidden, hidden)),
            (f"{layer}.post_attention_layernorm.weight", (hidden,)),
            (f"{layer}.mlp.gate_proj.weight", (intermediate, hidden)),
            (f"{layer}.mlp.up_proj.weight", (intermediate, hidden)),
            (f"{layer}.mlp.down_proj.weight", (hidden, intermediate)),
        ]
    return [*found, ("model.norm.weight", (hidden,)), ("lm_head.weight", (vocabulary, hidden))]


def random_bfloat16(rng: np.random.Generator, count: int) -> bytes:
    """Normal values with standard deviation 0.02, truncated to bfloat16's upper 16 bits."""
    values = rng.standard_normal(count, dtype=np.float32) * np.float32(0.02)
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def make_checkpoint(
    folder: Path, *, layers: int, hidden: int, intermediate: int, vocabulary: int, heads: int, kv_heads: int, shard_size: int
) -> int:
    """Writes config.json, shards and their index. Returns the bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    kv = hidden // heads * kv_heads
    shards, size = [[]], 0
    for name, shape in tensors(layers, hidden, intermediate, vocabulary, kv):
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and size + nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append((name, "BF16", shape))
        size += nbytes
    rng, total, weight_map = np.random.default_rng(0), 0, {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(build_header(specs, {"format": "pt"})[0])
            for name, _, shape in specs:
                weight_map[name] = file
                count = int(np.prod(shape))
                total += 2 * count
                block = random_bfloat16(rng, min(count, CHUNK))  # repeated: generating is slower than writing
                for first in range(0, count, CHUNK):
                    out.write(block[: 2 * min(CHUNK, count - first)])
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return total


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--shard-size", type=parse_size, default="5GB")
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    print(f"{make_checkpoint(folder, **options):,} bytes of weights in {folder}")


if __name__ == "__main__":
    main()
