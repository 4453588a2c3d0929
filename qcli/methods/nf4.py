"""NF4: 4-bit NormalFloat, a codebook of normal quantiles (QLoRA, arXiv:2305.14314, section 3)."""

from typing import ClassVar

from qcli.methods._four_bits import Blockwise4bit
from qcli.methods._method import Method


class NF4(Blockwise4bit):
    """See Blockwise4bit for the options."""

    codebook: ClassVar[str] = "nf4"


METHOD: type[Method] = NF4
