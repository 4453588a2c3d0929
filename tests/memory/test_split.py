"""Splits over GPUs: device_map="auto" as transformers computes it, and the split that fits if any does."""

import itertools

import pytest
import torch
import transformers as t
from transformers.integrations.accelerate import _get_device_map

from qcli.memory.installed import transformers_version
from qcli.memory.placing.split import CPU, Block, device_map_auto, even, fill, loads, ranges

LLAMA = t.LlamaConfig(
    hidden_size=256, intermediate_size=688, num_hidden_layers=12, num_attention_heads=8, vocab_size=1000, tie_word_embeddings=False
)
GPT2 = t.GPT2Config(n_embd=192, n_layer=9, n_head=4, vocab_size=3000)


def blocks_of(model) -> list[Block]:
    """The embedding, the layers and the rest of a real model, by its own tensors."""
    sizes: dict[str, int] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        part = next((f"layer {p}" for p in name.split(".") if p.isdigit()), None)
        part = part or (name if "embed_tokens" in name or ".wt" in name or ".wp" in name else "head")
        sizes[part] = sizes.get(part, 0) + tensor.numel() * tensor.element_size()
    layers = [f"layer {i}" for i in range(model.config.num_hidden_layers)]
    order = [*(name for name in sizes if name not in (*layers, "head")), *layers, "head"]
    tied = model.config.tie_word_embeddings
    return [Block(name, sizes[name], sizes[name], with_first=tied and name == "head") for name in order]


def places_by_transformers(model, memory: dict) -> list[int]:
    """The place of each embedding, of each layer and of the head in the map that from_pretrained(device_map="auto") makes."""
    made = _get_device_map(model, "auto", memory | {"cpu": 1 << 40}, None)
    stack, embeddings, head = "model.layers", ["model.embed_tokens"], "lm_head"
    if model.config.model_type == "gpt2":
        stack, embeddings = "transformer.h", ["transformer.wte", "transformer.wpe"]
    names = [*embeddings, *(f"{stack}.{i}" for i in range(model.config.num_hidden_layers)), head]
    found = []
    for name in names:
        prefixes = [".".join(name.split(".")[:n]) for n in range(len(name.split(".")), -1, -1)]
        place = next(made[prefix] for prefix in prefixes if prefix in made)
        found.append(CPU if place == "cpu" else place)
    return found


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.5, 0.9), (0.3, 0.4, 0.9), (0.25, 0.25, 0.25, 0.6), (0.3, 0.3)], ids=str)
@pytest.mark.parametrize("model_class, config", [(t.LlamaForCausalLM, LLAMA), (t.GPT2LMHeadModel, GPT2)])
def test_the_split_is_that_of_transformers(model_class, config, shares):
    with torch.device("meta"):
        model = model_class(config)
    blocks = blocks_of(model)
    total = sum(block.weights for block in blocks)
    memory = [int(share * total) for share in shares]
    if model_class is t.GPT2LMHeadModel and shares == (1.0, 1.0) and transformers_version() < (5, 20):
        pytest.skip("transformers 5.17 splits what just fits a little otherwise")
    assert device_map_auto(blocks, memory, quantized=False) == places_by_transformers(model, dict(enumerate(memory)))


def test_the_quantizers_of_transformers_leave_a_tenth_free():
    blocks = [Block(f"layer {i}", 10, 10) for i in range(10)]
    assert device_map_auto(blocks, [200, 200], quantized=False).count(0) == 5  # 50 + 12 of buffer - 10 kept on GPU 0
    assert device_map_auto(blocks, [200, 200], quantized=True).count(0) == 4  # 0.9 * 62 - 10


@pytest.mark.parametrize("rooms", [(50, 50), (30, 80), (30, 60), (13, 13, 90), (100,), (120,), (0, 100), ()], ids=str)
def test_fill_fits_exactly_when_some_split_does(rooms):
    sizes = [12, 7, 7, 9, 7, 20, 7, 7, 24]
    blocks = [Block(f"layer {i}", size - 2, size, state=2) for i, size in enumerate(sizes)]
    cuts = itertools.combinations_with_replacement(range(len(sizes) + 1), max(0, len(rooms) - 1))
    runs = ([sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cut, len(sizes)))] for cut in cuts)
    possible = bool(rooms) and any(all(run <= room for run, room in zip(found, rooms)) for found in runs)
    for places in (fill(blocks, rooms), even(blocks, rooms)):
        assert (CPU not in places) == possible
        held = [sum(load) for load in loads(blocks, places, len(rooms))]
        assert all(size <= room for size, room in zip(held, rooms))
        assert sum(held) + sum(s for s, place in zip(sizes, places) if place == CPU) == 100


def test_an_even_split_does_not_leave_the_last_gpu_empty():
    blocks = [Block(f"layer {i}", 10, 10) for i in range(8)]
    assert fill(blocks, [80, 80]) == [0] * 8
    assert even(blocks, [80, 80]) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_what_lies_where_in_words():
    blocks = [Block("embedding", 1, 1), *(Block(f"layer {i}", 1, 1) for i in range(3)), Block("head", 1, 1)]
    assert ranges(blocks, [0, 0, 0, 1, 1], 0) == "embedding, layers 0-1"
    assert ranges(blocks, [0, 0, 0, 1, 1], 1) == "layer 2, head"
    assert ranges(blocks, [0, 0, 0, 0, 0], 0) == "embedding, layers 0-2, head"
    assert ranges(blocks, [0, 0, 0, 0, 0], 1) == "nothing"
    assert ranges([Block("encoder layer 0", 1, 1), Block("encoder layer 1", 1, 1), *blocks[1:]], [0] * 6, 0) == (
        "encoder layers 0-1, layers 0-2, head"
    )
    assert ranges([Block("embedding", 1, 1), *blocks], [0] * 6, 0) == "embedding, layers 0-2, head"
    assert ranges(blocks, [0, 0, CPU, CPU, 0], 0) == "embedding, layer 0, head"
