"""An embedding whose rows are those of a quantized weight, which an output head may share."""

import torch
from torch import nn

from qcli.nn.quantized_linear import QuantizedLinear


class QuantizedEmbedding(nn.Module):
    """Looks up rows of `linear`, a module with the quantized weight [num_embeddings, embedding_dim].

    Its parameters and buffers are those of `linear`, under the same names. The rows come in `dtype`, multiplied by `scale`.
    """

    def __init__(self, linear: QuantizedLinear, dtype: torch.dtype, scale: float = 1.0):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.dtype = linear.out_features, linear.in_features, dtype
        self.__dict__["linear"] = linear  # no module of its own: loaders know the tensors by the embedding's name
        self._parameters, self._buffers = linear._parameters, linear._buffers
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [...] to [..., embedding_dim] in `dtype`."""
        found = self.linear.rows(ids.reshape(-1), self.dtype).view(*ids.shape, self.embedding_dim)
        return found if self.scale == 1 else found * self.scale

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.linear.scheme.name if self.linear.scheme else 'quantized'}"
