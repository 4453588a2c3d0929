"""`qcli generate`: text out of a model, streamed as it is made."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.errors import CheckpointError, UsageError


def generate(
    model: Annotated[str, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; '-' reads it from stdin.", show_default=False)
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="At most so many. Default: the model's own, else 128.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the model's own, else greedy.", show_default=False)
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="For the same text again.", show_default=False)] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template; without a prompt, talk turn by turn.")
    ] = False,
    bits: Annotated[
        int | None, typer.Option(help="Quantize an unquantized model while reading it: 4 or 8.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="nf4, fp4 or llm-int8, instead of --bits.", show_default=False)
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of all that is not quantized: auto, bfloat16, float16, float32.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="auto splits the model over GPUs and CPU memory.", show_default=False)
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Limits of --device-map, such as 0=20GB,cpu=30GB.", show_default=False)
    ] = None,
    no_int8_activations: Annotated[
        bool,
        typer.Option(
            "--no-int8-activations",
            help="8-bit models: only weights are 8-bit; what flows between layers stays 16-bit.",
        ),
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Continue a prompt with a quantized or an unquantized model."""
    text = _prompt(prompt, prompt_file, chat, json)

    from qcli import decode
    from qcli import model as models

    sampling = decode.Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    loaded, tokenizer = models.load(
        model,
        bits=bits,
        method=method,
        dtype=dtype,
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        int8_activations=not no_int8_activations,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer", "Put its tokenizer files beside config.json.")
    if not chat:
        _answer(loaded, tokenizer, _plain_ids(loaded, tokenizer, text), sampling, json)
        return
    if not tokenizer.chat_template:
        raise CheckpointError(f"{model} has no chat template", "Leave out --chat to continue the prompt as plain text.")
    if text is not None:
        _answer(loaded, tokenizer, _chat_ids(tokenizer, [{"role": "user", "content": text}]), sampling, json)
        return
    _talk(loaded, tokenizer, sampling)


def _prompt(prompt: str | None, file: Path | None, chat: bool, json: bool) -> str | None:
    if prompt is not None and file is not None:
        raise UsageError("a prompt and --prompt-file were both given", "Give one of them.")
    if file is not None:
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"cannot read the prompt from {file}: {getattr(e, 'strerror', None) or e}") from e
    if prompt == "-" or (prompt is None and not chat and not sys.stdin.isatty()):
        return sys.stdin.read()
    if prompt is None and not chat:
        raise UsageError(
            "no prompt was given", "Write it after the model, or pass --prompt-file, '-' for stdin, or --chat."
        )
    if prompt is None and json:
        raise UsageError("--json with --chat needs a prompt", "Give one after the model.")
    return prompt


def _plain_ids(model, tokenizer, text: str) -> list[int]:
    ids = tokenizer(text)["input_ids"]
    if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id and len(ids) > 1:
        if not model.config.is_encoder_decoder:
            ids = ids[:-1]  # some tokenizers close a text; a prompt is to be continued
    if ids:
        return ids
    if tokenizer.bos_token_id is None:
        raise UsageError("the prompt is empty, and the tokenizer has no token to begin a text with", "Give a prompt.")
    return [tokenizer.bos_token_id]


def _chat_ids(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _answer(model, tokenizer, ids: list[int], sampling, json: bool) -> str:
    """Generates, streams unless `json`, and tells what it took."""
    from qcli import decode

    stream = decode.TextStream(tokenizer, ids)
    parts = []

    def show(piece: str) -> None:
        parts.append(piece)
        if piece and not json:
            console.out(piece, end="")

    ends = decode.end_tokens(model, tokenizer)
    try:
        result = decode.generate(
            model, tokenizer, ids, sampling, lambda token: show("" if token in ends else stream.push(token))
        )
        show(stream.flush())
    finally:
        if not json:
            console.out()
    text = "".join(parts)
    stats = _stats(model, result)
    if json:
        console.json({"text": text, "token_ids": result.token_ids, **stats})
    else:
        _say_stats(stats)
    return text


def _stats(model, result) -> dict[str, object]:
    from qcli.devices import gpus_of
    from qcli.process import peak_memory

    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    peak = peak_memory()
    if gpus := gpus_of(model):
        import torch

        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    rate = result.decode_rate
    return {
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "finished": result.finished,
        "prefill_tokens_per_second": round(result.prefill_rate, 2),
        "decode_tokens_per_second": None if rate is None else round(rate, 2),
        "capture_seconds": result.capture_seconds and round(result.capture_seconds, 3),
        "peak_memory_bytes": peak,
        "weight_bytes": weights,
    }


def _say_stats(stats: dict) -> None:
    from qcli.sizes import format_bytes

    rate = stats["decode_tokens_per_second"]
    console.say(
        f"[{stats['prompt_tokens']} prompt tokens at {stats['prefill_tokens_per_second']:.1f}/s, "
        f"{stats['new_tokens']} new at {'-' if rate is None else f'{rate:.1f}'}/s; "
        f"weights {format_bytes(stats['weight_bytes'])}, peak memory {format_bytes(stats['peak_memory_bytes'])}]"
    )


def _talk(model, tokenizer, sampling) -> None:
    """Turn by turn until the end of input, or /exit."""
    console.say("Type a message; an end of input (Ctrl-D) or /exit leaves.")
    messages: list[dict[str, str]] = []
    while (line := console.ask("> ")) is not None and line.strip() != "/exit":
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        text = _answer(model, tokenizer, _chat_ids(tokenizer, messages), sampling, json=False)
        messages.append({"role": "assistant", "content": text})
