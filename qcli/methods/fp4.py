"""FP4: a sign, two exponent bits and one mantissa bit, by the rule of bitsandbytes' CUDA kernels."""

from typing import ClassVar

from qcli.methods._four_bits import Blockwise4bit
from qcli.methods._method import Method


class FP4(Blockwise4bit):
    """See Blockwise4bit for the options."""

    codebook: ClassVar[str] = "fp4"


METHOD: type[Method] = FP4
