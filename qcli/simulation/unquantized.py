"""The weights as they are, in a float32 product: what every other method is compared with."""

from math import prod

import torch

from qcli.checkpoint.dtypes import ITEMSIZE
from qcli.simulation._base import Prepared, Simulation


class Unquantized(Simulation):
    """Rounds nothing. The weight takes what its stored dtype takes."""

    name = "fp32"

    def weight(self, weight: torch.Tensor) -> Prepared:
        return Prepared(weight.float())

    def stored_bytes(self, shape: tuple[int, int], dtype: str = "BF16", outlier_columns: int = 0) -> int:
        return prod(shape) * ITEMSIZE[dtype]


SIMULATIONS = (Unquantized(),)
