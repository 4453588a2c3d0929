"""Single weights that stand out from all others of a matrix: candidates for super weights (arXiv:2411.07191).

The paper finds super weights in down projections of early layers, one to six in a model, by the activations that they cause.
Magnitude alone is only a hint. A weight that stands out need not be a super weight; a forward pass decides. Both bounds are qcli's.
"""

import torch

from qcli.outliers.weights.inspection import LargeWeight

TIMES_RMS = 20.0  # a Gaussian matrix of 10^8 weights reaches 6
TIMES_NEXT = 1.5  # against the largest weight that does not stand out
_KEPT = 8


class LargestWeights:
    """The largest magnitudes of a matrix that comes in rows, and where they are."""

    def __init__(self, columns: int):
        self._columns = columns
        self._values = torch.zeros(0)
        self._places = torch.zeros(0, dtype=torch.long)

    def add(self, rows: torch.Tensor, first: int) -> None:
        """Counts rows [n, columns] in, which begin at row `first` of the matrix."""
        # The largest weights are in the rows of the largest absmax.
        best = rows.abs().amax(1).topk(min(_KEPT, len(rows))).indices
        flat = rows[best].view(-1)
        places = flat.abs().topk(min(_KEPT, len(flat))).indices
        values = torch.cat((self._values, flat[places].float()))
        places = (best[places // self._columns] + first) * self._columns + places % self._columns
        places = torch.cat((self._places, places))
        kept = values.abs().argsort(descending=True, stable=True)[:_KEPT]
        self._values, self._places = values[kept], places[kept]

    def found(self, rms: float) -> list[LargeWeight]:
        """The weights that stand out, largest first: TIMES_RMS times the matrix's `rms` or more, and TIMES_NEXT times the next one.

        Where several weights could be the last of them, it is the one with the widest gap below it.
        """
        sizes = self._values.abs().double()
        gaps = sizes[:-1] / sizes[1:]
        gaps[sizes[:-1] < TIMES_RMS * rms] = 0
        if not rms or not len(gaps) or gaps.max() < TIMES_NEXT:
            return []
        count = int(gaps.argmax()) + 1
        return [
            LargeWeight(
                row=int(place) // self._columns,
                column=int(place) % self._columns,
                weight=float(value),
                times_rms=abs(float(value)) / rms,
                times_next=float(abs(value) / sizes[count]) if sizes[count] else None,
            )
            for value, place in zip(self._values[:count], self._places[:count])
        ]
