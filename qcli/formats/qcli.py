"""qcli's own format: the tensors of bitsandbytes, for what its readers have no place for. qcli alone reads it.

It holds schemes of 4 and of 8 bits in one model, and an output head that is quantized together with the embedding to which it is
tied. transformers does not know the format: it would skip what the config says and take codes for weights. So all codes lie in one
column, as bitsandbytes lays out those of 4 bits, and transformers stops at their shape.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from qcli.formats import Choice, Format
from qcli.formats.bitsandbytes import Bitsandbytes
from qcli.schemes import PAPER_THRESHOLD, Scheme


class Qcli(Bitsandbytes):
    """See the module and qcli.formats.Format. 8-bit codes: P I8 [out_features * in_features, 1]."""

    name = "qcli"

    def refuses_head(self, head: Scheme, others: Sequence[Scheme], tied: bool) -> str | None:
        return self.refuses(head)

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return out_features * in_features, 1

    def config(self, choice: Choice, compute_dtype: str) -> dict[str, Any]:
        thresholds = sorted({scheme.threshold for scheme in choice.schemes.values() if scheme.bits == 8})
        if len(thresholds) > 1:
            choice.problems.append(f"{self.name}'s format has one threshold, and the recipe asks for {thresholds}")
        return {
            "bnb_4bit_compute_dtype": compute_dtype,
            "llm_int8_threshold": float(thresholds[0]) if thresholds else PAPER_THRESHOLD,
            "quant_method": self.name,
        }

    def owns(self, config: Mapping[str, Any]) -> bool:
        return bool(config.get("quant_method") == self.name)


FORMAT: Format = Qcli()
