"""Reads a checkpoint's tokenizer through transformers. Any exception of a tokenizer library becomes a message of one sentence."""

import importlib.util
import re
from collections.abc import Sequence

import transformers

from qcli.checkpoint.carried import has_tokenizer
from qcli.checkpoint.source import Source
from qcli.errors import CheckpointError, first_line
from qcli.files.foreign_json import NUMBER, check
from qcli.loading.adapter import Adapter

# A word in an error message -> (the module that is needed, the package that has it)
_PACKAGES = {
    "tekken": ("mistral_common", "mistral-common"),
    "mistral-common": ("mistral_common", "mistral-common"),
    "mistral_common": ("mistral_common", "mistral-common"),
    "tiktoken": ("tiktoken", "tiktoken"),
    "sentencepiece": ("sentencepiece", "sentencepiece"),
    "protobuf": ("google.protobuf", "protobuf"),
    "sacremoses": ("sacremoses", "sacremoses"),
    "fugashi": ("fugashi", "fugashi"),
    "jieba": ("jieba", "jieba"),
    "rjieba": ("rjieba", "rjieba"),
    "pythainlp": ("pythainlp", "pythainlp"),
    "phonemizer": ("phonemizer", "phonemizer"),
}


def read_tokenizer(source: Source | Adapter, trust_remote_code: bool, config):
    """The tokenizer of a checkpoint or of an adapter, or None if it has no tokenizer files.

    `config` is the model's transformers config: its type decides the class of a tokenizer whose files name none. Raises
    CheckpointError.
    """
    names = [name for name in source.place.names if "/" not in name]
    if not has_tokenizer(names):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.config_folder, config=config, trust_remote_code=trust_remote_code
        )
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # tokenizers raises plain Exception, and BaseException when its Rust code panics
        raise _unreadable(source.label, names, e) from e
    if not hasattr(tokenizer, "decode"):  # transformers returns False for a tokenizer that it cannot make
        raise CheckpointError(f"{source.label}: transformers cannot make a tokenizer from its files", "Fetch its files again.")
    longest = {"model_max_length": getattr(tokenizer, "model_max_length", None)}
    check(longest, {"model_max_length": NUMBER}, f"{source.label}/tokenizer_config.json", "Mend it, or fetch it again.")
    if getattr(tokenizer, "chat_template", None) is None and "chat_template.json" in names:
        tokenizer.chat_template = _processor_template(source)
    return tokenizer


def _unreadable(label: str, names: list[str], error: BaseException) -> CheckpointError:
    text = str(error)
    asked = [word for word in _PACKAGES if re.search(rf"\b{word}\b", text)]
    missing = {package for module, package in map(_PACKAGES.get, asked) if not _installed(module)}
    if missing and not ("tokenizer.json" in names and not isinstance(error, ImportError)):
        packages = sorted(missing)
        return CheckpointError(
            f"{label}: its tokenizer needs {' or '.join(packages)}, which is not installed",
            f"Install it: pip install {' '.join(packages)}",
        )
    if "trust_remote_code" in text or "custom code" in text:
        return CheckpointError(
            f"{label}: its tokenizer is code that comes with it", "Pass --trust-remote-code if you trust the model's author."
        )
    if isinstance(error, ImportError):
        return CheckpointError(f"{label}: its tokenizer needs more than is installed: {' '.join(text.split())}")
    return CheckpointError(f"{label}: its tokenizer cannot be loaded: {first_line(error)}", "Fetch its files again.")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _processor_template(source: Source | Adapter) -> str | None:
    """The chat template of a processor: older models with images keep it in a separate file."""
    value = source.json("chat_template.json")
    template = value.get("chat_template")
    return template if isinstance(template, str) else None


def check_ids(model, tokenizer, ids: Sequence[int]) -> None:
    """Raises CheckpointError for an id beyond the rows of the model's embedding."""
    rows = _embedding_rows(model)
    beyond = next((i for i in ids if rows is not None and i >= rows), None)
    if beyond is not None:
        raise CheckpointError(
            f"the tokenizer makes token {beyond} of the text ({tokenizer.convert_ids_to_tokens(beyond)!r}), "
            f"the model's embedding has {rows:,} rows",
            "The tokenizer belongs to another model, or tokens were added to it and not to the model.",
        )


def _embedding_rows(model) -> int | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)
