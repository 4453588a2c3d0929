"""NF4 products over the widths that real models have: does any width fall off?

    python benchmarks/widths.py [--threads N] [--megabytes M] [--rounds R]

For each width, a weight of M million bytes of codes, read from memory, with one, four and sixteen tokens; absmax plain and doubly
quantized. Prints GB/s of codes, and each width's share of the better of its two neighbours, the worst at the end. Writes
benchmarks/results/widths-NAME.json. Takes a minute or two.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import alternate, copies, machine  # noqa: E402
from rows import save  # noqa: E402

from qcli import console  # noqa: E402
from qcli.ops._library import blocks  # noqa: E402
from qcli.ops.linear_4bit import Prepared4bit  # noqa: E402

# in_features of the linear modules of these models.
MODELS = {
    "SmolLM2-135M": (576, 1536),
    "SmolLM2-360M": (960, 2560),
    "GPT-2": (768, 3072),
    "GPT-2 medium": (1024, 4096),
    "GPT-2 XL": (1600, 6400),
    "Pythia-70M": (512, 2048),
    "Qwen2.5-0.5B": (896, 4864),
    "Qwen2.5-1.5B": (1536, 8960),
    "Qwen2.5-3B": (2048, 11008),
    "Qwen2.5-7B": (3584, 18944),
    "Qwen3-0.6B": (1024, 3072),
    "Gemma-3-270M": (640, 2048),
    "Gemma-3-1B": (1152, 6912),
    "Gemma-2-2B": (2304, 9216),
    "Gemma-3-4B": (2560, 10240),
    "TinyLlama-1.1B": (2048, 5632),
    "Llama-3.2-3B": (3072, 8192),
    "Llama-2-7B": (4096, 11008),
    "Llama-3-8B": (4096, 14336),
    "Llama-2-13B": (5120, 13824),
    "Phi-2": (2560, 10240),
    "Phi-3-mini": (3072, 8192),
    "StableLM-2-1.6B": (2048, 5632),
    "OPT-350M": (1024, 4096),
    "OPT-6.7B": (4096, 16384),
    "Bloom-560M": (1024, 4096),
    "Falcon-1B": (2048, 8192),
    "Falcon-7B": (4544, 18176),
    "Cerebras-GPT-256M": (1088, 4352),
    "OLMo-2-1B": (2048, 8192),
}
# Multiples of 32 that no model above has, for blocks that straddle rows.
OTHERS = (160, 288, 416, 544, 736, 1056, 1440)
TOKENS = (1, 4, 16)


def speed(width: int, nbytes: int, rounds: int) -> dict[str, float]:
    """GB/s of codes by "plain" or "nested" and the number of tokens."""
    out_features = max(2 * nbytes // width, 1)

    def make():
        codes, count = torch.randint(256, (out_features * width // 2,), dtype=torch.uint8), blocks(out_features * width, 64)
        absmax, nested = torch.rand(count) + 0.5, torch.randint(256, (count,), dtype=torch.uint8)
        rest = (None, 64, "nf4", out_features, torch.bfloat16)
        return {
            "plain": Prepared4bit(width, codes, absmax, None, 0.0, *rest),
            "nested": Prepared4bit(width, codes, nested, torch.rand(blocks(count, 256)), 0.5, *rest),
        }

    weights = copies(make, nbytes)
    inputs = {tokens: torch.randn(tokens, width).bfloat16() for tokens in TOKENS}
    runs = {
        f"{kind}, {tokens} tokens": lambda kind=kind, tokens=tokens: weights()[kind](inputs[tokens])
        for kind in ("plain", "nested")
        for tokens in TOKENS
    }
    size = out_features * width / 2
    return {name: size / seconds / 1e9 for name, seconds in alternate(runs, rounds).items()}


def shares(found: dict[int, dict[str, float]]) -> dict[int, float]:
    """Of each width, the smallest share of the better neighbour's speed, over all runs."""
    widths = sorted(found)
    result = {}
    for i, width in enumerate(widths):
        near = [found[other] for other in widths[max(i - 1, 0) : i + 2] if other != width]
        result[width] = min(found[width][name] / max(other[name] for other in near) for name in found[width])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    widths = sorted({width for pair in MODELS.values() for width in pair} | set(OTHERS))
    with torch.inference_mode():
        found = {width: speed(width, options.megabytes * 10**6, options.rounds) for width in widths}
    share, about = shares(found), machine()
    console.out(" width  " + "  ".join(found[widths[0]]) + "  share of the better neighbour")
    for width in widths:
        console.out(f"{width:6}  " + "  ".join(f"{v:{len(name)}.2f}" for name, v in found[width].items()) + f"  {share[width]:.2f}")
    worst = min(share, key=share.__getitem__)
    nested = sum(row["plain, 1 tokens"] / row["nested, 1 tokens"] for row in found.values()) / len(found)
    console.out(f"worst: {worst} with {share[worst]:.2f}; time with double quantization, one token: {nested:.2f} times plain's")
    result = {"machine": about, "megabytes": options.megabytes, "gigabytes_per_second": found, "share": share}
    console.out(f"written to {save('widths', str(about['cpu']), result)}")


if __name__ == "__main__":
    main()
