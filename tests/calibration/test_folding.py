"""What folds are found in each architecture, and that a float model gives the same logits after all of them."""

import pytest
import torch

from qcli.calibration.folding import Fold, Folding
from tests.models import example_inputs, make_model

QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
LLAMA = {Fold(QKV, "input_layernorm"), Fold(GATE_UP, "post_attention_layernorm"), Fold(("mlp.down_proj",), "mlp.up_proj", first=0)}
GEMMA = {
    Fold(QKV, "input_layernorm", 1.0),
    Fold(GATE_UP, "pre_feedforward_layernorm", 1.0),
    Fold(("mlp.down_proj",), "mlp.up_proj", first=0),
}
FOLDS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {
        Fold(("self_attn.qkv_proj",), "input_layernorm"),
        Fold(("mlp.gate_up_proj",), "post_attention_layernorm"),
        Fold(("mlp.down_proj",), "mlp.gate_up_proj", first=128),
    },
    "opt": {
        Fold(("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"), "self_attn_layer_norm"),
        Fold(("self_attn.out_proj",), "self_attn.v_proj", first=0),
        Fold(("fc1",), "final_layer_norm"),
        Fold(("fc2",), "fc1", first=0),  # a ReLU lets positive factors pass
    },
    "mixtral": {Fold(QKV, "input_layernorm")},
    "cohere": {Fold((*QKV, *GATE_UP), "input_layernorm"), Fold(("mlp.down_proj",), "mlp.up_proj", first=0)},
    "olmo2": {Fold(("mlp.down_proj",), "mlp.up_proj", first=0)},  # whose norms follow the modules
    "gpt2": {Fold(("attn.c_attn",), "ln_1"), Fold(("attn.c_proj",), "attn.c_attn", first=128), Fold(("mlp.c_fc",), "ln_2")},
    "bloom": {
        Fold(("self_attention.query_key_value",), "input_layernorm"),
        Fold(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
    },
}


def linear(module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def entered(model, blocks, inputs):
    """What each block is called with."""
    calls, handles = {}, []
    for block in blocks:
        keep = lambda module, args, kwargs: calls.setdefault(module, (args, kwargs))  # noqa: E731
        handles.append(block.register_forward_pre_hook(keep, with_kwargs=True))
    logits = model(**inputs, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return calls, logits


def groups_of(block, names, run) -> list[tuple[str, ...]]:
    read = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: read.__setitem__(name, a[0])) for name in names
    ]
    run()
    for handle in handles:
        handle.remove()
    found = {}
    for name in names:
        found.setdefault(read[name].data_ptr(), []).append(name)
    return [tuple(group) for group in found.values()]


@pytest.mark.parametrize("name", FOLDS)
@torch.inference_mode()
def test_logits_are_the_same_after_every_fold(name, tmp_path):
    model = make_model(name, tmp_path).float()
    blocks = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    calls, before = entered(model, blocks, example_inputs(model))
    generator = torch.Generator().manual_seed(1)
    for block in blocks:
        args, kwargs = calls[block]
        names = [path for path, module in block.named_modules() if linear(module)]
        transposed = {path for path in names if type(block.get_submodule(path)).__name__ == "Conv1D"}
        run = lambda block=block, args=args, kwargs=kwargs: block(*args, **kwargs)  # noqa: E731
        modules = {path: module for path, module in block.named_modules() if path}
        folding = Folding("block", modules, names, transposed, run)
        groups = groups_of(block, names, run)
        found, left = folding.find(groups)
        assert set(found) == FOLDS[name]
        assert {*(fold.readers for fold in found), *left} == set(groups)
        for fold in found:
            reader = modules[fold.readers[0]].weight
            size = reader.shape[0] if fold.readers[0] in transposed else reader.shape[1]
            folding.apply(fold, torch.empty(size).uniform_(-2, 2, generator=generator).exp())
    after = model(**example_inputs(model), use_cache=False).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


@torch.inference_mode()
def test_a_reader_that_nobody_knows_of_forbids_the_fold(tmp_path):
    """A module that reads the norm's output and whose weight may not be changed."""
    model = make_model("llama", tmp_path).float()
    block = model.model.layers[0]
    calls, _ = entered(model, [block], example_inputs(model))
    args, kwargs = calls[block]
    modules = {path: module for path, module in block.named_modules() if path}
    readers = ("self_attn.q_proj", "self_attn.k_proj")
    folding = Folding("block", modules, readers, set(), lambda: block(*args, **kwargs))
    before = {name: p.clone() for name, p in block.named_parameters()}
    assert folding.find([readers]) == ([], [readers])
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
