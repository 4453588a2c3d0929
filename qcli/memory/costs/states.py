"""The state that a recurrent layer keeps of each sequence, whatever its length: its last inputs and its memory.

Shapes are those of transformers 5's modeling files. A convolution runs over the last `kernel` inputs of each channel, which are
kept in the model's dtype. The recurrent state is kept in float32. vLLM keeps `kernel` - 1 inputs, and the recurrent state in the
dtype that the config names, or else in the model's.
"""

from dataclasses import dataclass

_HEADS = ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
_HEAD_DIM = ("mamba_head_dim", "mamba_headdim", "mamba_d_head", "head_dim")
_STATE = ("mamba_d_state", "ssm_state_size", "state_size")
_KERNEL = ("mamba_d_conv", "conv_kernel")
_EXPAND = ("mamba_expand", "expand")
_MAMBA_1 = ("mamba", "falcon_mamba", "jamba", "zamba")


@dataclass(frozen=True)
class State:
    """Elements that one layer keeps for one sequence: `channels` x `kernel` inputs, and `recurrent` more. `formula` explains them.

    Its scan works on `inner` channels, in `heads` (0 where each channel is alone) of `size` states or keys each. It takes `chunk`
    tokens at a time; 0 where the config does not name them.
    """

    channels: int
    kernel: int
    recurrent: int
    formula: str
    inner: int = 0
    heads: int = 0
    size: int = 0
    chunk: int = 0


def state(config, kind: str) -> State:
    """The state of a layer of `kind` (linear_attention, conv or hybrid) of `config`, a ModelConfig."""
    if kind == "conv":
        return State(config.hidden_size, config.integer("conv_L_cache"), 0, "hidden_size x conv_L_cache")
    if config.model_type == "recurrent_gemma":
        width = config.integer("lru_width", default=config.hidden_size)
        kernel = config.integer("conv1d_width", default=4) - 1
        return State(width, kernel, width, "lru_width x (conv1d_width - 1) inputs, lru_width")
    if config.model_type == "minimax":
        size = config.heads * config.head_dim**2
        return State(0, 0, size, "heads x head_dim^2")
    if config.model_type == "kimi_linear":
        return _kimi_delta(config)
    if config.get("linear_num_value_heads", default=None) is not None or config.model_type == "olmo_hybrid":
        return _gated_delta(config)
    if config.model_type in _MAMBA_1:
        inner = config.integer(*_EXPAND) * config.hidden_size
        formula = "inner x conv_kernel inputs, inner x state_size; inner = expand x hidden_size"
        size = config.integer(*_STATE)
        return State(inner, config.integer(*_KERNEL), inner * size, formula, inner, size=size)
    return _mamba_2(config)


def _mamba_2(config) -> State:
    inner = config.integer("mamba_d_ssm", default=None)
    if inner is None and config.model_type == "nemotron_h":
        inner = config.integer(*_HEADS) * config.integer(*_HEAD_DIM)
    if inner is None:
        inner = config.integer(*_EXPAND) * config.hidden_size
    groups = config.integer("mamba_n_groups", "mamba_ngroups", "n_groups")
    size = config.integer(*_STATE)
    formula = "(inner + 2 x groups x state_size) x conv_kernel inputs, inner x state_size"
    channels, kernel = inner + 2 * groups * size, config.integer(*_KERNEL)
    heads, chunk = config.integer(*_HEADS), config.integer("mamba_chunk_size", "chunk_size", default=256)
    return State(channels, kernel, inner * size, formula, inner, heads, size, chunk)


def _gated_delta(config) -> State:
    key_heads = config.positive("linear_num_key_heads", default=config.heads)
    value_heads = config.integer("linear_num_value_heads", default=config.heads)
    key_dim = config.integer("linear_key_head_dim", default=int(0.75 * config.hidden_size / key_heads))
    value_dim = config.integer("linear_value_head_dim", default=2 * key_dim)
    formula = "(2 x key_heads x key_dim + value_heads x value_dim) x conv_kernel inputs, value_heads x key_dim x value_dim"
    inner, kernel = value_heads * value_dim, config.integer("linear_conv_kernel_dim")
    return State(2 * key_heads * key_dim + inner, kernel, inner * key_dim, formula, inner, value_heads, key_dim)


def _kimi_delta(config) -> State:
    nested = "linear_attn_config"
    heads = config.nested(nested, "num_heads") or config.integer("linear_num_heads")
    width = config.nested(nested, "head_dim") or config.integer("linear_head_dim")
    kernel = config.nested(nested, "short_conv_kernel_size") or config.integer("linear_conv_kernel_dim")
    formula = "3 x heads x head_dim x conv_kernel inputs, heads x head_dim^2"
    return State(3 * heads * width, kernel, heads * width**2, formula)
