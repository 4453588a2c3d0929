"""The tools of the families: a collector of names and shapes, and the blocks that many families share."""

from collections.abc import Iterable

from qcli.memory.model.config import ModelConfig


class Shapes:
    """Parameter names and shapes, in the order in which they were added."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, ...]] = {}

    def tensor(self, name: str, *shape: int) -> None:
        self.found[name] = shape

    def linear(self, name: str, out_features: int, in_features: int, bias: bool = False) -> None:
        self.found[f"{name}.weight"] = (out_features, in_features)
        if bias:
            self.found[f"{name}.bias"] = (out_features,)

    def conv1d(self, name: str, out_features: int, in_features: int) -> None:
        """transformers' Conv1D: a linear layer stored transposed, with a bias."""
        self.found[f"{name}.weight"] = (in_features, out_features)
        self.found[f"{name}.bias"] = (out_features,)

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        self.found[f"{name}.weight"] = (size,)
        if bias:
            self.found[f"{name}.bias"] = (size,)

    def embedding(self, name: str, rows: int, width: int) -> None:
        self.found[f"{name}.weight"] = (rows, width)

    def head(self, config: ModelConfig, width: int, bias: bool = False) -> None:
        """The output head: its weight, unless it is the embedding, and its bias."""
        if not config.tied_embeddings:
            self.found["lm_head.weight"] = (config.vocab_size, width)
        if bias:
            self.found["lm_head.bias"] = (config.vocab_size,)


def attention(
    model: Shapes,
    at: str,
    config: ModelConfig,
    *,
    bias: bool = False,
    output_bias: bool | None = None,
    output: str = "o_proj",
    gated: bool = False,
) -> None:
    """Query, key, value and output projections with grouped heads. `gated` doubles the query's width (Qwen3-Next)."""
    hidden, width, kv_width = config.hidden_size, config.heads * config.head_dim, config.kv_heads * config.head_dim
    model.linear(f"{at}.q_proj", width * (2 if gated else 1), hidden, bias)
    model.linear(f"{at}.k_proj", kv_width, hidden, bias)
    model.linear(f"{at}.v_proj", kv_width, hidden, bias)
    model.linear(f"{at}.{output}", hidden, width, bias if output_bias is None else output_bias)


def gated_mlp(model: Shapes, at: str, hidden: int, width: int, bias: bool = False) -> None:
    """gate, up and down projections (SwiGLU, GeGLU)."""
    model.linear(f"{at}.gate_proj", width, hidden, bias)
    model.linear(f"{at}.up_proj", width, hidden, bias)
    model.linear(f"{at}.down_proj", hidden, width, bias)


def fused_experts(model: Shapes, at: str, experts: int, hidden: int, width: int) -> None:
    """The router, and gated experts as transformers 5 holds them: two tensors for all."""
    model.tensor(f"{at}.gate.weight", experts, hidden)
    model.tensor(f"{at}.experts.gate_up_proj", experts, 2 * width, hidden)
    model.tensor(f"{at}.experts.down_proj", experts, hidden, width)


def norms(model: Shapes, at: str, names: Iterable[str], size: int, bias: bool = False) -> None:
    """Several norms of one block."""
    for name in names:
        model.norm(f"{at}.{name}", size, bias)
