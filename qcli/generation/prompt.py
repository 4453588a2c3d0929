"""A prompt's token ids. Tokenizers are files and code of others: whatever they raise becomes a sentence."""

from qcli.errors import CheckpointError, UsageError, first_line


def check_text(text: str) -> None:
    """Raises UsageError for a text that is no Unicode: bytes that the command line or stdin could not decode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UsageError(
            f"the prompt is not valid UTF-8 at character {e.start + 1:,}", "Convert it, as iconv -t UTF-8 does."
        ) from None


def plain_ids(model, tokenizer, text: str) -> list[int]:
    """Ids of a text to be continued. An empty one begins where the tokenizer's texts begin.

    Raises UsageError for an empty prompt without such a token, CheckpointError where the tokenizer does not fit the model.
    """
    ids = tokenized(tokenizer, text)
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not model.config.is_encoder_decoder:
        ids = ids[:-1]  # some tokenizers close a text; a prompt is to be continued
    if not ids and tokenizer.bos_token_id is None:
        raise UsageError("the prompt is empty, and the tokenizer has no token to begin a text with", "Give a prompt.")
    ids = ids or [tokenizer.bos_token_id]
    check_ids(model, tokenizer, ids)
    return ids


def tokenized(tokenizer, text: str, **options) -> list[int]:
    """The tokenizer's ids of a text. Raises CheckpointError, UsageError."""
    check_text(text)
    try:
        ids = tokenizer(text, **options)["input_ids"]
    except Exception as e:  # tokenizers raises plain Exception, remote code anything
        raise CheckpointError(
            f"{type(tokenizer).__name__} cannot read the prompt: {first_line(e)}", "Fetch the tokenizer's files again."
        ) from e
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise CheckpointError(f"{type(tokenizer).__name__} makes no list of token ids of the prompt")
    return ids


def check_ids(model, tokenizer, ids: list[int]) -> None:
    """Raises CheckpointError for an id that the model's embedding has no row for."""
    rows = _embedding_rows(model)
    beyond = next((i for i in ids if rows is not None and i >= rows), None)
    if beyond is not None:
        raise CheckpointError(
            f"the tokenizer makes token {beyond} of the prompt ({tokenizer.convert_ids_to_tokens(beyond)!r}), "
            f"the model's embedding has {rows:,} rows",
            "The tokenizer is another model's, or tokens were added to it and not to the model.",
        )


def _embedding_rows(model) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)
