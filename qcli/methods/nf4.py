"""NF4: 4-bit NormalFloat, a codebook of normal quantiles (QLoRA, arXiv:2305.14314, section 3)."""

from qcli.methods._blockwise import Blockwise4bit


class NF4(Blockwise4bit):
    """See Blockwise4bit for the options."""

    name = "nf4"


METHOD = NF4
