"""A prompt's token ids. Tokenizers are other people's files and code: any exception becomes a message of one sentence."""

from qcli.errors import CheckpointError, UsageError, first_line
from qcli.loading.tokenizer import check_ids


def check_text(text: str) -> None:
    """Raises UsageError for a text with bytes that the command line or stdin could not decode as UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UsageError(
            f"the prompt is not valid UTF-8 at character {e.start + 1:,}", "Convert it, as iconv -t UTF-8 does."
        ) from None


def plain_ids(model, tokenizer, text: str) -> list[int]:
    """Ids of a text to be continued. For an empty text: the tokenizer's start token.

    Raises UsageError for an empty prompt where there is no such token, CheckpointError if the tokenizer does not fit the model.
    """
    ids = tokenized(tokenizer, text)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not model.config.is_encoder_decoder:
        ids = ids[:-1]  # some tokenizers add an end token, but a prompt is to be continued
    if not ids and tokenizer.bos_token_id is None:
        raise UsageError("the prompt is empty, and the tokenizer has no token that begins a text", "Give a prompt.")
    ids = ids or [tokenizer.bos_token_id]
    check_ids(model, tokenizer, ids)
    return ids


def tokenized(tokenizer, text: str, **options) -> list[int]:
    """The tokenizer's ids of a text. Raises CheckpointError, UsageError."""
    check_text(text)
    try:
        ids = tokenizer(text, **options)["input_ids"]
    except Exception as e:  # tokenizers raises plain Exception, remote code raises anything
        raise CheckpointError(
            f"{type(tokenizer).__name__} cannot read the prompt: {first_line(e)}", "Fetch the tokenizer's files again."
        ) from e
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise CheckpointError(f"{type(tokenizer).__name__} does not return a list of token ids for the prompt")
    return ids
