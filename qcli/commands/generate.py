"""`qcli generate`: continues a prompt and streams the text."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.commands._model import asked_model
from qcli.commands._settings import cache_dtype, pairs
from qcli.errors import CheckpointError, UsageError


def generate(
    model: Annotated[str | None, typer.Argument(help="A folder, or a model id on the hub.", show_default=False)] = None,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue; '-' reads it from stdin.", show_default=False)] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.", show_default=False)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="At most this many. Default: the model's own, else 128.", show_default=False)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the model's own, else greedy.", show_default=False)
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this much probability.", show_default=False)] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.", show_default=False)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.", show_default=False)] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template; without a prompt, talk turn by turn.")] = False,
    bits: Annotated[
        int | None, typer.Option(help="Quantize an unquantized model while reading it: 4 or 8.", show_default=False)
    ] = None,
    method: Annotated[str | None, typer.Option(help="A method of `qcli quantize`, instead of --bits.", show_default=False)] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe in JSON, instead of --bits and --method.", show_default=False)
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Modules to leave unquantized. Repeatable.", show_default=False)
    ] = None,
    head: Annotated[
        int | None,
        typer.Option(
            help="With --bits, --method or --recipe: bits of the output head, 16, 8 or 4. Default 16.", show_default=False
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Options of the method, such as block_size=128.", show_default=False),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A LoRA adapter, a folder or a hub id, to run with the model.", show_default=False)
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|prompt",
            help="Guess tokens with a smaller model, or from the prompt, and check several in a step. The text stays the same.",
            show_default=False,
        ),
    ] = None,
    kv_dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the cache: 16 (the model's) or 8 (int8, half of it). Default: 16.", show_default=False),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of all that is not quantized: auto, bfloat16, float16, float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="auto splits the model over GPUs and CPU memory.", show_default=False)
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(help="Limits of --device-map, such as 0=20GB,cpu=30GB.", show_default=False)
    ] = None,
    int8_activations: Annotated[
        bool | None,
        typer.Option(
            "--int8-activations/--no-int8-activations",
            help="LLM.int8(): also round activations. Default: for prompts, and on a GPU.",
            show_default=False,
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run model code that comes with the checkpoint.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
) -> None:
    """Continue a prompt with a quantized or an unquantized model."""
    model = asked_model(model, 'qcli generate HuggingFaceTB/SmolLM2-135M "Once upon a time"')
    text = _prompt(prompt, prompt_file, chat, json)
    kv_dtype = cache_dtype(kv_dtype)

    # What needs no library comes first: a wrong option or a damaged folder is refused at once.
    from qcli.devices import never_fails, place
    from qcli.generation.sampling import Sampling
    from qcli.loading.adapter import open_adapter
    from qcli.loading.opening import asked_recipe, open_checkpoint
    from qcli.recipe import read_recipe

    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    asked = asked_recipe(recipe and read_recipe(recipe), bits, method, {}, skip or (), pairs(set_), head)
    if not never_fails(device, device_map, max_memory):
        place(device, device_map, max_memory)
    adapted = None if adapter is None else open_adapter(adapter)
    source = open_checkpoint(model, revision, trust_remote_code)
    small = open_checkpoint(draft, None, trust_remote_code) if draft not in (None, "prompt") else None
    source.read_ahead()

    from qcli.generation import decode
    from qcli.generation.can_generate import check_can_generate
    from qcli.generation.chat import Chat
    from qcli.generation.prompt import plain_ids
    from qcli.loading import generation_config
    from qcli.loading import load as models

    placement = place(device, device_map, max_memory)
    # These checks come before any weight is read.
    check_can_generate(source.config, model, trust_remote_code)
    generation_config.check_source(source)
    loaded, tokenizer = models.load_source(
        source, asked, dtype=dtype, placement=placement, int8_activations=int8_activations, adapter=adapted
    )
    if tokenizer is None:
        raise CheckpointError(f"{model} has no tokenizer", "Put its tokenizer files beside config.json.")
    template = Chat(tokenizer, model) if chat else None
    decoding = decode.Decoding(loaded, tokenizer, sampling, template.turn_end if template else None, kv_dtype=kv_dtype)
    if draft is not None:
        decoding.draft = _draft(draft, small, decoding, tokenizer, dtype, placement)
    if template is None:
        _answer(decoding, tokenizer, plain_ids(loaded, tokenizer, text), [], json)
    elif text is not None:
        _answer(decoding, tokenizer, template.ids(loaded, [{"role": "user", "content": text}]), [], json)
    else:
        _talk(decoding, tokenizer, template)


def _draft(draft: str, source, decoding, tokenizer, dtype: str, placement):
    """What guesses tokens: the text so far, or the model of `source`, which is not loaded where it cannot be used."""
    from qcli.generation import decode, drafts, positions
    from qcli.loading import load as models

    if source is None or decoding.lean is None:
        return drafts.PromptLookup()  # decoding says so if it cannot be used
    model, others = models.load_source(source, None, dtype=dtype, placement=placement, int8_activations=None)
    if others is None:
        raise CheckpointError(f"{draft} has no tokenizer", "A draft must have the model's own tokenizer.")
    drafts.same_vocabulary(tokenizer, others)
    lean = decode.lean_of(model)
    if lean is None:
        raise UsageError(f"--draft: {draft} cannot guess: its layers have no lean step", "Take --draft prompt, or another draft.")
    return drafts.DraftModel(lean, positions.ends(model)[1])


def _prompt(prompt: str | None, file: Path | None, chat: bool, json: bool) -> str | None:
    if prompt is not None and file is not None:
        raise UsageError("a prompt and --prompt-file were both given", "Give one of them.")
    if file is not None:
        try:
            prompt = file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"cannot read the prompt from {file}: {getattr(e, 'strerror', None) or e}") from e
    elif prompt == "-" or (prompt is None and not chat and not sys.stdin.isatty()):
        with _readable("the prompt from stdin"):
            prompt = sys.stdin.read()
    if prompt is None and not chat:
        raise UsageError("no prompt was given", "Write it after the model, or pass --prompt-file, '-' for stdin, or --chat.")
    if prompt is None and json:
        raise UsageError("--json with --chat needs a prompt", "Give one after the model.")
    if prompt is not None and chat and not prompt.strip():
        raise UsageError("the message is empty", "Write one, or leave it out to talk turn by turn.")
    return prompt


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as e:
        raise UsageError(f"cannot read {what}: {e}", "Convert it, as iconv -t UTF-8 does.") from e


def _answer(decoding, tokenizer, ids: list[int], parts: list[str], json: bool) -> None:
    """Generates, appends the text to `parts` piece by piece, streams it unless `json`, and reports speed and memory."""
    from qcli.generation.text_stream import TextStream

    stream = TextStream(tokenizer, ids)

    def show(piece: str) -> None:
        parts.append(piece)
        if piece and not json:
            console.out(piece, end="")

    try:
        result = decoding.generate(ids, lambda token: show("" if token in decoding.ends else stream.push(token)))
        show(stream.flush())
    except BaseException:
        if any(parts) and not json:
            console.out()
        raise
    if not json:
        console.out()
    stats = _stats(decoding.model, result)
    if json:
        console.json({"text": "".join(parts), "token_ids": result.token_ids, **stats})
    else:
        _say_stats(stats)


def _stats(model, result) -> dict[str, object]:
    from qcli.devices import gpus_of
    from qcli.generation import memory_limit
    from qcli.nn.low_rank import adapter_bytes
    from qcli.process import peak_memory

    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) + adapter_bytes(model)
    peak = peak_memory()
    if gpus := gpus_of(model):
        import torch

        peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    rate = result.decode_rate
    # A draft's own steps are not counted, so there is no share beside one.
    counted = result.tokens_per_step == 1
    read, speed = memory_limit.bytes_a_step(model), memory_limit.memory_speed(model) if rate and counted else None
    read = None if read is None else read + round(result.cache_bytes or 0)
    return {
        "prompt_tokens": result.prompt_tokens,
        "kept_tokens": result.kept_tokens,
        "new_tokens": len(result.token_ids),
        "finished": result.finished,
        "prefill_tokens_per_second": round(result.prefill_rate, 2),
        "decode_tokens_per_second": None if rate is None else round(rate, 2),
        "capture_seconds": result.capture_seconds and round(result.capture_seconds, 3),
        "step": result.step,
        "tokens_per_step": result.tokens_per_step and round(result.tokens_per_step, 3),
        "bytes_per_step": read,
        "memory_bytes_per_second": speed and round(speed),
        "memory_limit_share": round(rate * read / speed, 3) if rate and read and speed else None,
        "peak_memory_bytes": peak,
        "weight_bytes": weights,
    }


def _say_stats(stats: dict) -> None:
    from qcli.sizes import format_bytes

    rate, share = stats["decode_tokens_per_second"], stats["memory_limit_share"]
    limit = "" if share is None else f" ({share:.0%} of what memory allows)"
    several = f", {stats['tokens_per_step']:.1f} a step" if stats["tokens_per_step"] not in (None, 1) else ""
    cut = "" if stats["finished"] else ", cut off"
    kept = f", {stats['kept_tokens']} of them kept, the others" if stats["kept_tokens"] else ""
    console.say(
        f"[{stats['prompt_tokens']} prompt tokens{kept} at {stats['prefill_tokens_per_second']:.1f}/s, "
        f"{stats['new_tokens']} new at {'-' if rate is None else f'{rate:.1f}'}/s{several}{limit}{cut}; "
        f"weights {format_bytes(stats['weight_bytes'])}, peak memory {format_bytes(stats['peak_memory_bytes'])}]"
    )


def _talk(decoding, tokenizer, template) -> None:
    """Answers messages turn by turn until the end of input or /exit."""
    console.say("Type a message. Ctrl-D or /exit leaves, Ctrl-C stops an answer.")
    messages: list[dict[str, str]] = []
    while (line := _ask()) is not None and line.strip() != "/exit":
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        parts: list[str] = []
        try:
            ids = _fitting(decoding, template, messages)
            with _stoppable():
                _answer(decoding, tokenizer, ids, parts, json=False)
        except _Stopped:
            console.say("[stopped]")
        except UsageError as e:  # only this message is wrong: the conversation continues
            console.error(e.message, e.hint)
        if parts:
            messages.append({"role": "assistant", "content": "".join(parts)})
        else:
            messages.pop()


def _ask() -> str | None:
    with _readable("what was typed"):
        line = console.ask("> ")
    if line is None:
        console.say()
    return line


def _fitting(decoding, template, messages: list[dict[str, str]]) -> list[int]:
    """Ids of the conversation. Its first turns are dropped while it is longer than the model's positions."""
    while True:
        ids = template.ids(decoding.model, messages)
        try:
            decoding.limit(len(ids))
        except UsageError:
            if len(messages) == 1:
                raise
            del messages[:2]
            console.warn("the conversation is longer than the model's context: its first turn is dropped")
        else:
            return ids


class _Stopped(BaseException):
    """Ctrl-C during an answer. Not an Exception, so that no library catches it."""


@contextmanager
def _stoppable() -> Iterator[None]:
    def stop(signum, frame):
        raise _Stopped

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
