"""Which columns of a weight stay in 16 bits: those whose range costs the others most.

A token's activations are rounded to int8 with one scale, that of its largest magnitude m among the rounded columns. Each of them
is then off by m / 254 at most, and the outputs by an error whose expected square is proportional to m^2. So the columns to leave
out are those without which the sum of m^2 over tokens is least. Dividing m^2 by the token's norm was measured, and was no better.

The search runs backwards. All candidates are left out at first, and the one is put back that adds least to the sum, until as many
remain as may stay in 16 bits. Forwards it would not begin: where two columns are equally large, leaving out one of them saves
nothing. Candidates are the columns that come nearest to setting scales.
"""

import torch

_CANDIDATES = 2  # times as many as are chosen


def choose(magnitude: torch.Tensor, count: int) -> torch.Tensor:
    """`count` columns int32 [count], ascending, of magnitudes [tokens, in_features] of activations."""
    tiny = torch.finfo(torch.float32).tiny
    x = magnitude.float()
    x = x / x.amax().clamp_min(tiny)  # whose squares are finite
    largest = x.amax(1, keepdim=True).clamp_min(tiny)
    # A column counts the squared scale times the fourth power of its own share of the scale: at half of it, a sixteenth.
    nearness = (x * (x / largest)).square_().sum(0)
    candidates = nearness.topk(min(_CANDIDATES * count, x.shape[1])).indices.sort().values
    rest = x.index_fill(1, candidates, 0.0).amax(1)
    of_candidate = x[:, candidates].t().contiguous()
    returned = torch.zeros(len(candidates), dtype=torch.bool, device=x.device)
    for _ in range(len(candidates) - count):
        cost = torch.maximum(of_candidate, rest).square_().sum(1)
        back = cost.masked_fill_(returned, torch.inf).argmin()
        returned[back] = True
        rest = torch.maximum(rest, of_candidate[back])
    return candidates[~returned].int()
