"""The criteria and Table 4 of LLM.int8() (arXiv:2208.07339), to compare a model with."""

from dataclasses import dataclass

THRESHOLD = 6.0  # magnitude of an outlier (section 4.1)
MIN_LAYERS = 0.25  # the share of the layers that an outlier feature shows in, at least
MIN_POSITIONS = 0.06  # and the share of the positions of all hidden states


@dataclass(frozen=True)
class Row:
    """A model of Table 4. Shares and top-1 attention probabilities are fractions, with and without the outlier features."""

    model: str
    parameters: str
    perplexity: float
    outliers: int
    one_sided: int
    layers_share: float
    positions_share: float
    quartiles: list[float]
    top1_with: float
    top1_without: float


TABLE_4 = [
    Row(*row)
    for row in (
        ("GPT2", "117M", 33.5, 1, 1, 0.25, 0.06, [-8, -7, -6], 0.45, 0.19),
        ("GPT2", "345M", 26.0, 2, 1, 0.29, 0.18, [6, 7, 8], 0.45, 0.19),
        ("FSEQ", "125M", 25.7, 2, 2, 0.25, 0.22, [-40, -23, -11], 0.32, 0.24),
        ("GPT2", "762M", 22.6, 2, 0, 0.31, 0.16, [-9, -6, 9], 0.41, 0.18),
        ("GPT2", "1.5B", 21.0, 2, 1, 0.41, 0.35, [-11, -9, -7], 0.41, 0.25),
        ("FSEQ", "1.3B", 15.9, 4, 3, 0.64, 0.47, [-33, -21, -11], 0.39, 0.15),
        ("FSEQ", "2.7B", 14.4, 5, 5, 0.52, 0.18, [-25, -16, -9], 0.45, 0.13),
        ("GPT-J", "6.0B", 13.8, 6, 6, 0.62, 0.28, [-21, -17, -14], 0.55, 0.10),
        ("FSEQ", "6.7B", 13.3, 6, 6, 1.00, 0.75, [-44, -40, -35], 0.35, 0.13),
        ("FSEQ", "13B", 12.5, 7, 6, 1.00, 0.73, [-63, -58, -45], 0.37, 0.16),
    )
]


def stage(layers_share: float, positions_share: float) -> str:
    """Where a model stands on the curve of section 4.2, in one sentence. The shares are those of its most common outlier
    feature."""
    if layers_share >= 1.0 and positions_share >= 0.73:
        return "Past the phase shift: as in the paper's models of 6.7B and more, all layers share the outlier features."
    row = min(TABLE_4[:-2], key=lambda r: abs(r.layers_share - layers_share) + abs(r.positions_share - positions_share))
    return (
        f"Before the phase shift, where all layers share them at 3 of 4 positions: nearest to {row.model} {row.parameters}, "
        f"{row.layers_share:.0%} of layers and {row.positions_share:.0%} of positions."
    )
