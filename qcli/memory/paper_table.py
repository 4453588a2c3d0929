"""The largest model that each hardware runs in 16 and in 8 bits.

This recomputes Table 2 of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) from the configs of its models. It makes the same
table for any other models and hardware.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qcli.memory.model.config import ModelConfig
from qcli.memory.model.opening import Model
from qcli.memory.model.parameters import parameters
from qcli.memory.placing.blocks import blocks_of
from qcli.memory.placing.hardware import GIB, Gpu
from qcli.memory.placing.split import CPU, fill

OVERHEAD = 1 * GIB  # on each GPU; any value from 0.73 to 1.38 GiB gives the paper's table
_SAME_SIZE = 0.02  # models within two per cent of the largest share its cell: OPT-175B and BLOOM, T5-11B and T0
RULE = (
    "The largest of the models named whose weights, split over the GPUs by whole blocks, leave 1 GiB on each for the CUDA "
    "context and the libraries; models within 2% of it in parameters share its cell. Weights alone: neither keys and values nor "
    "activations are counted."
)
PAPER_RULE = f"{RULE} Memory is taken as GiB."


@dataclass(frozen=True)
class Hardware:
    """The devices of one row, alike or not. `kind` and `label` are the row's first cells."""

    kind: str
    label: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Row:
    """`largest_8bit` and `largest_16bit` are labels of models, the largest first. They are empty where none fits."""

    hardware: Hardware
    largest_8bit: list[str]
    largest_16bit: list[str]


def table(models: Sequence[Model], hardware: Sequence[Hardware]) -> list[Row]:
    """A row for each hardware."""
    split = {
        bits: {model.label: blocks_of(model, method, "bfloat16", every_linear=True) for model in models}
        for bits, method in ((8, "llm-int8"), (16, "bfloat16"))
    }
    found = []
    for entry in hardware:
        rooms = [gpu.memory - OVERHEAD for gpu in entry.gpus]
        cells = {bits: _largest([model for model in models if CPU not in fill(split[bits][model.label], rooms)]) for bits in split}
        found.append(Row(entry, cells[8], cells[16]))
    return found


def summary(row: Row) -> dict[str, object]:
    """A row for JSON. `memory` is the bytes of each GPU."""
    return {
        "class": row.hardware.kind,
        "hardware": row.hardware.label,
        "memory": [gpu.memory for gpu in row.hardware.gpus],
        "largest_8bit": row.largest_8bit,
        "largest_16bit": row.largest_16bit,
    }


def _largest(models: list[Model]) -> list[str]:
    most = max((model.parameter_count for model in models), default=0)
    near = [model for model in models if model.parameter_count >= (1 - _SAME_SIZE) * most]
    return [model.label for model in sorted(near, key=lambda model: -model.parameter_count)]


def paper_models() -> list[Model]:
    """The models that the paper's table names."""
    found = []
    for label, raw in _MODELS.items():
        config = ModelConfig(raw, label)
        found.append(Model(label, config, parameters(config), "the published config"))
    return found


def paper_hardware() -> list[Hardware]:
    """The six rows of the paper's table, memory taken as GiB."""
    return [_hardware(*row) for row in _HARDWARE]


def _hardware(kind: str, label: str, count: int, gib: int) -> Hardware:
    return Hardware(kind, label, (Gpu(label, gib * GIB, f"{gib} GiB"),) * count)


_HARDWARE = (
    ("Enterprise", "8x A100 80 GB", 8, 80),
    ("Enterprise", "8x A100 40 GB", 8, 40),
    ("Academic server", "8x RTX 3090 24 GB", 8, 24),
    ("Academic desktop", "4x RTX 3090 24 GB", 4, 24),
    ("Paid cloud", "Colab Pro 15 GB", 1, 15),
    ("Free cloud", "Colab 12 GB", 1, 12),
)


def _opt(layers: int, hidden: int, heads: int) -> dict:
    return {
        "model_type": "opt",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "tie_word_embeddings": True,
    }


def _t5(hidden: int, ffn: int, heads: int, head_dim: int, gated: bool) -> dict:
    return {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "d_model": hidden,
        "d_ff": ffn,
        "num_heads": heads,
        "d_kv": head_dim,
        "vocab_size": 32128,
        "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not gated,
    }


_MODELS = {
    "OPT-175B": _opt(96, 12288, 96),
    "BLOOM": {"model_type": "bloom", "n_layer": 70, "hidden_size": 14336, "n_head": 112, "vocab_size": 250880},
    "OPT-66B": _opt(64, 9216, 72),
    "OPT-30B": _opt(48, 7168, 56),
    "OPT-13B": _opt(40, 5120, 40),
    "GPT-J-6B": {
        "model_type": "gptj",
        "n_layer": 28,
        "n_embd": 4096,
        "n_head": 16,
        "n_positions": 2048,
        "rotary_dim": 64,
        "n_inner": None,
        "vocab_size": 50400,
        "tie_word_embeddings": False,
    },
    "GPT-2 1.3B": {  # so called in the paper; it is GPT-2 XL, of 1.56B parameters
        "model_type": "gpt2",
        "n_layer": 48,
        "n_embd": 1600,
        "n_head": 25,
        "n_positions": 1024,
        "n_inner": None,
        "vocab_size": 50257,
    },
    "T5-11B": _t5(1024, 65536, 128, 128, gated=False),
    "T0-11B": _t5(4096, 10240, 64, 64, gated=True),
}
