"""Trains the demo model: a Llama of about a million parameters on the stories of stories.py, with genuine outlier features.

Large language models grow a few hidden dimensions whose values are 20 times larger than the rest, in nearly every layer and
at nearly every position (LLM.int8(), arXiv:2208.07339, section 4). A model of this size and training would not. Here they
come about in training as they do there, through the gains of the norms. In every RMSNorm before attention and before the
MLP the gains start at OUTLIER_GAIN for OUTLIER_DIMS and at GAIN for the rest. The weight columns that read a dimension
start smaller by as much as its gain is larger, and learn at a pace smaller by as much, so that the network begins in
balance; but each outlier dimension counts LEAN times as much as any other. In the embeddings they start off centre. All
else is ordinary training: it leans on these dimensions, they come to carry information, and zeroing them ruins the model
where zeroing others hardly matters. One scale for a whole row of activations, as in int8 without decomposition, is then
too coarse for the other dimensions.

The outliers' columns are small weights, and NF4, which gives BLOCK neighbouring weights of a row one scale, would lose
them next to large ones. So all outliers lie in the first block, and its other dimensions have NEIGHBOUR_GAIN, which makes
their columns small too.

    python examples/train_demo_model.py examples/demo-model

takes about a quarter of an hour on one core and needs nothing but the packages qcli itself needs.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from stories import HELD_OUT_SEED, stories
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUTLIER_DIMS = (7, 21, 38, 52)
OUTLIER_GAIN, NEIGHBOUR_GAIN, GAIN = 56.0, 1.25, 0.32
LEAN = 4.0
OFF_CENTRE = 0.06  # three standard deviations of an embedding
HIDDEN = 128
BLOCK = 64  # weights that share a scale in NF4
TRAIN_SEED, MODEL_SEED = 1, 3
VOCABULARY = 704
SEQUENCE = 136  # all of nearly every story
BATCH = 24


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every word of the stories is one token, and any other text still has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def build_model(vocabulary: int) -> LlamaForCausalLM:
    """The untrained model, its outlier gains and columns in place."""
    torch.manual_seed(MODEL_SEED)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    gains, paces = balance()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, list(OUTLIER_DIMS)] += OFF_CENTRE
        for norm in reading_norms(model):
            norm.copy_(gains)
        for weight in readers(model):
            weight *= paces
    return model


def balance() -> tuple[torch.Tensor, torch.Tensor]:
    """([HIDDEN] gains of the norms, [HIDDEN] size and pace of the weight columns that read them)."""
    gains, lean = torch.full((HIDDEN,), GAIN), torch.ones(HIDDEN)
    gains[:BLOCK] = NEIGHBOUR_GAIN
    gains[list(OUTLIER_DIMS)], lean[list(OUTLIER_DIMS)] = OUTLIER_GAIN, LEAN
    return gains, lean / gains


def readers(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The weights that read a norm's output, and with it the outlier dimensions."""
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
    return [p for n, p in model.named_parameters() if n.endswith(names)]


def reading_norms(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The gains of the norms before attention and before the MLP."""
    return [p for n, p in model.named_parameters() if n.endswith("layernorm.weight")]


def paced_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """One step in which columns move in proportion to their size at the start, and small gains in proportion to theirs."""
    gains, columns = balance()
    moving = [(p, columns) for p in readers(model)] + [(p, gains.clamp(max=1.0)) for p in reading_norms(model)]
    before = [p.detach().clone() for p, _ in moving]
    optimizer.step()
    with torch.no_grad():
        for (p, pace), old in zip(moving, before):
            p.sub_(old).mul_(pace).add_(old)


def batches(tokens: torch.Tensor, bos: int, steps: int):
    """Windows [BATCH, SEQUENCE + 1] of a token stream, each from the start of a story."""
    generator = torch.Generator().manual_seed(MODEL_SEED)
    starts = (tokens[: -SEQUENCE - 1] == bos).nonzero().view(-1)
    for _ in range(steps):
        chosen = starts[torch.randint(0, len(starts), (BATCH,), generator=generator)]
        yield torch.stack([tokens[s : s + SEQUENCE + 1] for s in chosen.tolist()])


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All stories in a row, each between <s> and </s>."""
    eos = tokenizer.eos_token_id
    return torch.tensor([i for ids in tokenizer(texts)["input_ids"] for i in (*ids, eos)])


def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int) -> tuple[float, float]:
    """(loss of the model, bound of the grammar) on unseen stories, in nats per token, each story read on its own."""
    model.eval()
    loss = bound = tokens = 0.0
    with torch.no_grad():
        for story in stories(HELD_OUT_SEED, count):
            ids = torch.tensor([[*tokenizer(story.text)["input_ids"], tokenizer.eos_token_id]])
            loss += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            bound += story.nats
            tokens += ids.shape[1] - 1
    model.train()
    return loss / tokens, bound / tokens


def main() -> None:
    """Trains and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1800)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    texts = [story.text for story in stories(TRAIN_SEED, 30_000)]
    tokenizer = train_tokenizer(texts[:5000])
    tokens = token_stream(tokenizer, texts)
    model = build_model(len(tokenizer))
    gains = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}], lr=3e-3, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / arguments.steps)))
    )
    started = time.monotonic()
    for step, batch in enumerate(batches(tokens, tokenizer.bos_token_id, arguments.steps), 1):
        loss = model(batch[:, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(loss, batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        paced_step(model, optimizer)
        schedule.step()
        if step % 200 == 0 or step == arguments.steps:
            held_out, bound = held_out_loss(model, tokenizer, 40)
            print(
                f"step {step}: loss {loss.item():.4f}, held out {held_out:.4f}, grammar's bound {bound:.4f}, "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )
    save(model, tokenizer, arguments.output)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Writes the model in bfloat16 with its tokenizer, generation config and card."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, max_new_tokens=160)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    held_out, bound = held_out_loss(model, tokenizer, 500)
    card = f"""---
license: apache-2.0
language: en
library_name: transformers
---

# qcli demo model

A Llama of {sum(p.numel() for p in model.parameters()):,} parameters that tells small animal stories. It was trained from scratch by
`examples/train_demo_model.py` on text which `examples/stories.py` generates, and has outlier features as large models do:
dimensions {", ".join(map(str, OUTLIER_DIMS))} at the inputs of attention and MLP.

Perplexity on 500 unseen stories: {math.exp(held_out):.4f}; an ideal reader of the grammar would have {math.exp(bound):.4f}.
"""
    (output / "README.md").write_text(card)
    print(json.dumps({"held_out_perplexity": math.exp(held_out), "bound": math.exp(bound)}))


if __name__ == "__main__":
    main()
