"""FP4: a sign, two exponent bits and one mantissa bit, by the rule of bitsandbytes' CUDA kernels."""

from qcli.methods._blockwise import Blockwise4bit


class FP4(Blockwise4bit):
    """See Blockwise4bit for the options."""

    name = "fp4"


METHOD = FP4
