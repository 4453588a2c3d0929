"""Reports of inspect-outliers as the instrument writes them, with made-up but plausible numbers."""

import random
from itertools import pairwise
from statistics import NormalDist

KINDS = {
    "attention input": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention output": ["self_attn.o_proj"],
    "ffn input": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn output": ["mlp.down_proj"],
}
NORMAL = NormalDist()
DIMS = [7, 21, 38, 52]
MAGNITUDES = [50.0, 33.0, 14.0, 8.0]
TOKENS = "<s> Once upon a time there was a clever mouse named Tilda who lived in a hollow tree .".split()
PAPER = [
    ("GPT2", "117M", 33.5, 1, 1, 25, 6, (-8, -7, -6), 45, 19),
    ("GPT2", "345M", 26.0, 2, 1, 29, 18, (6, 7, 8), 45, 19),
    ("FSEQ", "125M", 25.7, 2, 2, 25, 22, (-40, -23, -11), 32, 24),
    ("GPT2", "762M", 22.6, 2, 0, 31, 16, (-9, -6, 9), 41, 18),
    ("GPT2", "1.5B", 21.0, 2, 1, 41, 35, (-11, -9, -7), 41, 25),
    ("FSEQ", "1.3B", 15.9, 4, 3, 64, 47, (-33, -21, -11), 39, 15),
    ("FSEQ", "2.7B", 14.4, 5, 5, 52, 18, (-25, -16, -9), 45, 13),
    ("GPT-J", "6.0B", 13.8, 6, 6, 62, 28, (-21, -17, -14), 55, 10),
    ("FSEQ", "6.7B", 13.3, 6, 6, 100, 75, (-44, -40, -35), 35, 13),
    ("FSEQ", "13B", 12.5, 7, 6, 100, 73, (-63, -58, -45), 37, 16),
]

# What a tokenizer or a folder's name may hold.
HOSTILE = [
    "</script><script>window.entered = 1</script>",
    "<img src=x onerror='window.entered = 1'>",
    "<b>bold</b>",
    "&amp;",
    "{{plotly}}",
    "%{x}",
    "$x^2$",
    "\u2028",
    "\n",
    "\udc80",
    "<!--",
    "]]>",
    "<a href='javascript:window.entered = 1'>a</a>",
]


def demo_report(*, layers=6, outliers=True, optional=True, kinds=tuple(KINDS), name="demo-model", tokens=tuple(TOKENS)):
    """A report of `layers` layers. `optional=False` leaves out whatever may be null."""
    dice = random.Random(0)
    dims = DIMS if outliers else []
    return {
        "format": "qcli-outliers",
        "version": 1,
        "qcli": "0.1.0",
        "model": {
            "name": name,
            "architecture": "LlamaForCausalLM",
            "layers": layers,
            "hidden_size": 128,
            "parameters": 1369728,
            "quantization": None,
            "dtype": "bfloat16",
        },
        "text": {
            "name": "bundled text",
            "sequences": 8,
            "sequence_length": 128,
            "tokens": 1016,
            "bos_tokens": 8,
            "bos": True,
            "padding": 0,
        },
        "threshold": 6.0,
        "min_layers": 0.25,
        "min_positions": 0.06,
        "layers": [_layer(dice, i, layers, kinds, outliers, optional) for i in range(layers)],
        "features": [_feature(dim, size, rank) for rank, (dim, size) in enumerate(zip(dims, MAGNITUDES))],
        "table4": _table4(outliers, optional),
        "massive_activations": [
            {"layer": 2, "position": 0, "token": "<s>", "dim": 97, "value": 1200.0, "median": 0.3, "sequences": 8},
            {"layer": 3, "position": 0, "token": "<s>", "dim": 97, "value": -412.5, "median": 0.3, "sequences": 8},
        ]
        if optional
        else [],
        "super_weights": [
            {"layer": 1, "module": "mlp.down_proj", "row": 97, "column": 301, "weight": 2.1, "input": 8e2, "output": 1.65e3}
        ]
        if optional
        else [],
        "attention": {
            "sink_share": 0.8,
            "top1": 0.41,
            "layers": [
                {
                    "layer": i,
                    "top1_with": 0.38 + 0.05 * dice.random(),
                    "top1_without": 0.18 + 0.05 * dice.random(),
                    "top1_random": 0.38 + 0.05 * dice.random(),
                }
                for i in range(layers)
            ],
        }
        if optional
        else None,
        "bos": {"positions": 8, "absmax": 210.0, "outlier_dims": [7, 21]} if optional else None,
        "ablation": {
            "dims": dims,
            "random_dims": [3, 90, 100, 111],
            "top1": {"with": 0.41, "without": 0.20, "random": 0.41},
            "perplexity": {"whole": 25.1, "without": 180.2, "random": 25.2, "tokens": 1016},
        }
        if optional and outliers
        else None,
        "charts": _charts(dice, layers, dims, list(tokens)),
        "coverage": {"experts": "Tokens reached 61 of 64 experts; the other 3 are not in this report." if optional else None},
        "notes": ["Statistics are of the hidden states in float32.", "Quartiles come from a sketch: within 1% of the value."],
        "recommendation": {
            "method": "llm-int8",
            "threshold": 6.0,
            "skip": ["model.layers.1.mlp.down_proj"],
            "command": f"qcli quantize {name} --bits 8",
            "why": [
                "Plain int8 leaves 8 dB to what comes through ordinary channels; LLM.int8() leaves 37 dB.",
                "4 of 128 columns stay in 16 bits.",
            ],
        }
        if optional
        else None,
    }


def _layer(dice, index, layers, kinds, outliers, optional):
    return {
        "layer": index,
        "name": f"model.layers.{index}",
        "sites": [_site(dice, kind, index / layers, outliers and kind.endswith("input"), optional) for kind in kinds],
        "residual": {
            "absmax": 80.0 * (1 + index / layers),
            "rms": 3.0 + index / layers,
            "kurtosis": 99.0 + 20 * dice.random(),
            "median": 0.4,
            "massive": 0,
        },
    }


def _site(dice, kind, depth, outliers, optional):
    absmax = (52 if outliers else 4.8) * (1 + 0.2 * dice.random())
    rms = 2.2 if outliers else 1.0
    vectorwise = (24 if outliers else 37) + 2 * dice.random()
    ordinary = vectorwise - (9 - 3 * depth if outliers else 0)
    sqnr = {
        "int8-per-tensor": {"output": vectorwise - 5, "ordinary": ordinary - 5},
        "int8-row-wise": {"output": vectorwise - 1, "ordinary": ordinary - 1},
        "int8": {"output": vectorwise, "ordinary": ordinary},
        "llm-int8": {"output": 38.1, "ordinary": 37.2},
        "nf4": {"output": 20.7, "ordinary": 20.6},
    }
    return {
        "kind": kind,
        "modules": KINDS[kind],
        "channels": 128,
        "absmax": absmax,
        "rms": rms,
        "crest": absmax / rms,
        "kurtosis": 250 + 90 * dice.random() if outliers else 3.4 + dice.random(),
        "channel_ratio": 19.3 if outliers else 1.6,
        "token_ratio": 1.4,
        "outlier_columns": 4 if outliers else 0,
        "outlier_share": 0.0213 if outliers else 0.0,
        "dims": [
            {
                "dim": dim,
                "count": 980,
                "share": 0.96,
                "min": -1.3 * size,
                "max": -6.2,
                "mean": -size,
                "std": 4.1,
                "absmax": 1.3 * size,
                "kurtosis": 2.9,
                "quartiles": [-1.1 * size, -size, -0.9 * size],
                "one_sided": True,
            }
            for dim, size in zip(DIMS, MAGNITUDES)
        ]
        if outliers
        else [],
        "sqnr": sqnr if optional else None,
    }


def _feature(dim, size, rank):
    sign = 1 if rank == 1 else -1
    inner, outer = sorted([sign * 0.9 * size, sign * 1.1 * size])
    return {
        "dim": dim,
        "layers_share": 1 - 0.28 * rank,
        "positions_share": 0.95 - 0.3 * rank,
        "positions_union": 0.99 - 0.25 * rank,
        "absmax": 1.3 * size,
        "quartiles": [inner, sign * size, outer],
        "one_sided": rank != 2,
        "outlier": rank < 3,
    }


def _table4(outliers, optional):
    row = {
        "outliers": 3,
        "one_sided": 2,
        "layers_share": 1.0,
        "positions_share": 0.95,
        "positions_union": 0.99,
        "quartiles": [-55.0, -50.0, -45.0],
    }
    none = {"outliers": 0, "one_sided": 0, "layers_share": 0.0, "positions_share": 0.0, "positions_union": 0.0, "quartiles": None}
    measured = {"top1_with": 0.41, "top1_without": 0.2, "perplexity": 25.1}
    return (
        (row if outliers else none)
        | (measured if optional else dict.fromkeys(measured))
        | {
            "papers_rows": [
                {
                    "model": model,
                    "parameters": size,
                    "perplexity": perplexity,
                    "outliers": many,
                    "one_sided": one_sided,
                    "layers_share": layers / 100,
                    "positions_share": positions / 100,
                    "quartiles": list(quartiles),
                    "top1_with": top1 / 100,
                    "top1_without": without / 100,
                }
                for model, size, perplexity, many, one_sided, layers, positions, quartiles, top1, without in PAPER
            ]
        }
    )


def _charts(dice, layers, dims, tokens):
    size = dict(zip(DIMS, MAGNITUDES))
    shown = dims + [3, 19, 64, 80, 101] if dims else []
    steps = [0.4 * 1.12**k for k in range(48)]  # bins as wide as their values are great
    edges = [-step for step in reversed(steps)] + [0.0] + steps
    values = [
        [round(dice.gauss(-size[d] if d in dims else 0, size[d] * 0.1 if d in dims else 1), 3) for d in range(128)] for _ in tokens
    ]
    return {
        "heatmap": {
            "kind": "attention input",
            "layers": list(range(layers)),
            "dims": shown,
            "absmax": [[size.get(d, 3.2) * (0.6 + 0.6 * i / layers + 0.1 * dice.random()) for d in shown] for i in range(layers)],
            "share": [
                [min(1, size[d] / 50) * (0.8 + 0.2 * dice.random()) if d in size else 0.0 for d in shown] for i in range(layers)
            ],
        },
        "surface": {"layer": layers // 2, "kind": "attention input", "tokens": tokens, "dims": list(range(128)), "values": values},
        "histograms": [
            {
                "dim": d,
                "layer": layers // 2,
                "kind": "attention input",
                "edges": edges,
                "quartiles": [-1.1 * size[d], -size[d], -0.9 * size[d]],
                "counts": [
                    round(1000 * (NORMAL.cdf((b + size[d]) / 5) - NORMAL.cdf((a + size[d]) / 5))) for a, b in pairwise(edges)
                ],
            }
            for d in dims[:3]
        ],
    }
