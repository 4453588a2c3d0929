"""llama.cpp's part of benchmarks/decoding.py, in an interpreter of its own.

    python -m venv other && other/bin/pip install xllamacpp gguf
    other/bin/python benchmarks/llama_cpp_speed.py FILE.gguf [--write FOLDER KIND] [--threads N] [--context N]

With --write, the file is made if it is missing: random weights of KIND (Q4_0, Q4_1, Q8_0) with the shapes in FOLDER's config.json.
Linear weights and the embedding are of KIND, the output layer is Q8_0, as in llama.cpp's own files. Then each line of stdin,
{"prompt": 128, "new": 48}, is answered with llama.cpp's own timings, {"prefill": ..., "decode": ...} in tokens per second.
"""

import argparse
import json
import random
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from gguf.quants import quantize

RESERVED = 259  # <unk>, <s>, </s> and the bytes


def write_gguf(path: Path, config: dict, kind: gguf.GGMLQuantizationType) -> None:
    """Writes a GGUF file with the config's shapes, and a vocabulary of made-up words: llama.cpp's server needs one."""
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
    writer.add_tokenizer_model("llama")
    words = [f"w{i}" for i in range(vocabulary - RESERVED)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words])
    writer.add_token_scores([0.0] * vocabulary)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
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


def server(path: Path, threads: int, context: int):
    """llama.cpp with one place for a text."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers, parameters.verbosity = context, 1, 0, 0
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.fit_params = False
    return xllamacpp.Server(parameters)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--write", nargs=2, metavar=("FOLDER", "KIND"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=2048)
    options = parser.parse_args()
    if options.write and not options.file.exists():
        config = json.loads((Path(options.write[0]) / "config.json").read_text())
        write_gguf(options.file, config, gguf.GGMLQuantizationType[options.write[1]])
    running, rng = server(options.file, options.threads, options.context), random.Random(0)
    print(json.dumps({"version": xllamacpp.__version__}), flush=True)
    while line := input():
        asked = json.loads(line)
        ids = [rng.randrange(RESERVED, 4000) for _ in range(asked["prompt"])]
        request = {"prompt": ids, "n_predict": asked["new"], "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        done = running.handle_completions(request)
        timings = (done if isinstance(done, dict) else json.loads(done))["timings"]
        rates = {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}
        print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    main()
