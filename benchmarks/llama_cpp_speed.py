"""Tokens per second of llama.cpp on a Llama with random weights, for the comparison in benchmarks/cpu.py.

    python -m venv other && other/bin/pip install llama-cpp-python gguf
    other/bin/python benchmarks/llama_cpp_speed.py FOLDER [--threads 2]

If llama.cpp is built from source, it uses every instruction set that the compiler finds on this CPU. If a virtual machine announces
AMX but faults on it, leave AMX out: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON
-DGGML_AVX512_BF16=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON" with `pip install --no-binary llama-cpp-python`.

FOLDER has a config.json of benchmarks/make_checkpoint.py. The GGUF files are made beside it. Prints one JSON object: per type, the
tokens per second of the prefill, and of decoding after the prompt.
"""

import argparse
import ctypes
import json
import time
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
from gguf.quants import quantize

TYPES = {"Q4_0": gguf.GGMLQuantizationType.Q4_0, "Q8_0": gguf.GGMLQuantizationType.Q8_0}


def write_gguf(path: Path, config: dict, kind: gguf.GGMLQuantizationType) -> None:
    """Writes a GGUF file with the config's shapes: linear weights of one type, the output layer in Q8_0, norms in float32."""
    rng = np.random.default_rng(0)
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, kv_heads, vocabulary = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    kv = hidden // heads * kv_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(wide)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    made = {}

    def linear(name, out_features, in_features, kind=kind):
        key = (out_features, in_features, kind)
        if key not in made:  # weights of one shape are the same: they are random anyway
            values = rng.standard_normal((out_features, in_features), dtype=np.float32) * np.float32(0.02)
            made[key] = quantize(values, kind)
        writer.add_tensor(name, made[key].copy(), raw_dtype=kind)

    linear("token_embd.weight", vocabulary, hidden)
    linear("output.weight", vocabulary, hidden, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, dtype=np.float32))
        linear(f"blk.{i}.attn_q.weight", hidden, hidden)
        linear(f"blk.{i}.attn_k.weight", kv, hidden)
        linear(f"blk.{i}.attn_v.weight", kv, hidden)
        linear(f"blk.{i}.attn_output.weight", hidden, hidden)
        linear(f"blk.{i}.ffn_gate.weight", wide, hidden)
        linear(f"blk.{i}.ffn_up.weight", wide, hidden)
        linear(f"blk.{i}.ffn_down.weight", hidden, wide)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def speed(path: Path, threads: int, prompt: int, new: int) -> dict[str, float]:
    """Prefill and decode tokens per second: medians of three runs."""
    parameters = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {path}")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = 512, 512, 512
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)

    def run(count: int) -> float:
        tokens = (llama_cpp.llama_token * count)(*range(5, 5 + count))
        started = time.perf_counter()
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, count)):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_get_logits(context)
        llama_cpp.llama_synchronize(context)
        return time.perf_counter() - started

    memory = llama_cpp.llama_get_memory(context)
    prefills, decodes = [], []
    for _ in range(4):
        llama_cpp.llama_memory_clear(memory, True)
        prefills.append(prompt / run(prompt))
        decodes.append(new / sum(run(1) for _ in range(new)))
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return {"prefill": float(np.median(prefills[1:])), "decode": float(np.median(decodes[1:]))}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=48)
    options = parser.parse_args()
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    config = json.loads((options.folder / "config.json").read_text())
    found = {"version": llama_cpp.__version__}
    for name, kind in TYPES.items():
        path = options.folder / f"{name}.gguf"
        if not path.exists():
            write_gguf(path, config, kind)
        found[name] = speed(path, options.threads, options.prompt, options.new)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
