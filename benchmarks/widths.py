"""Products of quantized layers over the widths that real models have: does any width fall off?

    python benchmarks/widths.py [--threads N] [--megabytes M] [--rounds R]

For each width, a weight of M million bytes of codes, read from memory, with 1, 4, 16 and 64 tokens: NF4 with plain absmax and with
double quantization (linear_4bit), int8 weights (linear_w8a16), int8 weights and activations (linear_int8). A narrow weight of that
size has many rows, and so many outputs, which are bytes too. Prints GB/s of codes, inputs and outputs, and each width's share of
the better of its two neighbours, the worst at the end. Writes benchmarks/results/widths-NAME.json and draws it, beside it in .svg.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from measure import alternate, copies, machine  # noqa: E402
from rows import save  # noqa: E402

from qcli import console  # noqa: E402
from qcli.files.figure import figure  # noqa: E402
from qcli.nn.linear_4bit import Linear4bit  # noqa: E402
from qcli.nn.linear_8bit import Linear8bit  # noqa: E402
from qcli.ops._library import blocks  # noqa: E402

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
TOKENS = (1, 4, 16, 64)
KINDS = ("NF4, plain absmax", "NF4", "int8 weights", "LLM.int8()")


def layers(width: int, nbytes: int) -> dict[str, torch.nn.Module]:
    """A layer of each kind with random codes of `nbytes` bytes."""
    rows4, rows8 = max(2 * nbytes // width, 1), max(nbytes // width, 1)
    codes, count = torch.randint(256, (rows4 * width // 2, 1), dtype=torch.uint8), blocks(rows4 * width, 64)
    plain = {"weight": codes, "weight_absmax": torch.rand(count) + 0.5}
    nested = {
        "weight": codes,
        "weight_absmax": torch.randint(256, (count,), dtype=torch.uint8),
        "weight_nested_absmax": torch.rand(blocks(count, 256)),
    }
    int8 = {"weight": torch.randint(-127, 128, (rows8, width), dtype=torch.int8), "SCB": torch.rand(rows8) + 0.5}
    of_4bit = {"quant_type": "nf4", "block_size": 64, "compute_dtype": torch.bfloat16, "dtype": torch.bfloat16}
    of_8bit = {"tensors": int8, "threshold": 6.0, "dtype": torch.bfloat16}
    made = {
        "NF4, plain absmax": Linear4bit(width, rows4, False, tensors=plain, nested_offset=None, **of_4bit),
        "NF4": Linear4bit(width, rows4, False, tensors=nested, nested_offset=0.5, **of_4bit),
        "int8 weights": Linear8bit(width, rows8, False, **of_8bit),
        "LLM.int8()": Linear8bit(width, rows8, False, **of_8bit),
    }
    made["int8 weights"].rounds_activations = False
    return made


def speed(width: int, nbytes: int, rounds: int) -> dict[str, float]:
    """GB/s of codes, inputs and outputs by the kind of layer and the number of tokens."""
    weights = copies(lambda: layers(width, nbytes), nbytes)
    inputs = {tokens: torch.randn(tokens, width).bfloat16() for tokens in TOKENS}
    found = {}
    for tokens in TOKENS:
        x = inputs[tokens]
        runs = {kind: lambda kind=kind, x=x: weights()[kind](x) for kind in KINDS}
        for kind, seconds in alternate(runs, rounds).items():
            rows = nbytes // width * (2 if kind.startswith("NF4") else 1)
            found[f"{kind}, {tokens} tokens"] = (nbytes + 2 * tokens * (width + rows)) / seconds / 1e9  # bfloat16
    return found


def shares(found: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """Of each width and run, the share of the better neighbour's speed."""
    widths = sorted(found)
    result = {}
    for i, width in enumerate(widths):
        near = [found[other] for other in widths[max(i - 1, 0) : i + 2] if other != width]
        result[width] = {name: found[width][name] / max(other[name] for other in near) for name in found[width]}
    return result


def draw(found: dict[int, dict[str, float]], title: str, path: Path) -> None:
    """A panel for each number of tokens, a line for each kind."""
    with figure(path, 12, 8) as made:
        for number, tokens in enumerate(TOKENS, 1):
            axes = made.add_subplot(2, 2, number)
            for kind in KINDS:
                axes.plot(sorted(found), [found[w][f"{kind}, {tokens} tokens"] for w in sorted(found)], label=kind)
            axes.set(xscale="log", ylim=(0, None), title=f"{tokens} token{'s' * (tokens > 1)}")
            axes.set_xticks(
                [160, 576, 1024, 2048, 4096, 8192, 18944], labels=["160", "576", "1024", "2048", "4096", "8192", "18944"]
            )
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        made.supxlabel("width (in_features)")
        made.supylabel("GB/s of codes, inputs and outputs")
        made.suptitle(title)
        made.axes[0].legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--megabytes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    widths = sorted({width for pair in MODELS.values() for width in pair} | set(OTHERS))
    with torch.inference_mode():
        found = {width: speed(width, options.megabytes * 10**6, options.rounds) for width in widths}
    share, about = shares(found), machine()
    for kind in KINDS:
        names = [f"{kind}, {tokens} tokens" for tokens in TOKENS]
        rows = [
            [width, *(f"{found[width][n]:.2f}" for n in names), f"{min(share[width][n] for n in names):.2f}"] for width in widths
        ]
        console.table(kind, ["width", *(f"{tokens} tokens" for tokens in TOKENS), "share of the better neighbour"], rows)
    worst = {name: min(widths, key=lambda width: share[width][name]) for name in share[widths[0]]}
    for name, width in worst.items():
        console.out(f"{name}: the worst is {width} with {share[width][name]:.2f}")
    ratio = [row["NF4, plain absmax, 1 tokens"] / row["NF4, 1 tokens"] for row in found.values()]
    console.out(f"time with double quantization, one token: {sorted(ratio)[len(ratio) // 2]:.3f} times plain's (median)")
    result = {
        "machine": about,
        "megabytes": options.megabytes,
        "time_with_double_quantization": sorted(ratio)[len(ratio) // 2],
        "worst": {name: {"width": width, "share": share[width][name]} for name, width in worst.items()},
        "gigabytes_per_second": found,
        "share": share,
    }
    path = save("widths", f"{about['cpu']} {about['variant']}", result)
    draw(found, f"{about['cpu']}, {about['variant']}, {about['threads']} threads", path.with_suffix(".svg"))
    console.out(f"wrote {path} and {path.with_suffix('.svg').name}")


if __name__ == "__main__":
    main()
