"""Which files of a checkpoint are copied into the output unchanged: every file that does not hold its weights in another form.

Tokenizers have many names (tekken.json, source.spm, bpe.codes, original/tokenizer.model). So have templates, processors,
pooling folders, prompts and licences. A list of names would miss some, hence the rule names what is left out.
"""

import re
from dataclasses import dataclass

from qcli.errors import CheckpointError
from qcli.files.foreign_json import parse
from qcli.sizes import format_bytes

MOST_BYTES = 100_000_000  # per file; the largest tokenizers have a third of it
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data(_\d+)?|h5|msgpack|tflite|ot|pdparams|mlmodel|engine|plan|pte)$"
    r"|\.(safetensors|bin|h5|msgpack)\.index(\.\w+)?\.json$|\.(mlpackage|mlmodelc)/|(^|/)adapter_config\.json$",
    re.IGNORECASE,
)
_TOKENIZER = re.compile(r"(^|/)[^/]*(tokenizer|sentencepiece|spiece|spm|bpe|vocab)[^/]*$", re.IGNORECASE)
_IS_TOKENIZER = re.compile(
    r"(tokenizer.*|vocab.*|merges\.txt|.*spiece.*|sentencepiece.*|tekken\.json|.*\.(tiktoken|spm|bpe|codes|tokenizer))",
    re.IGNORECASE,
)
_BESIDE_TOKENIZER = re.compile(r"(special_tokens_map|added_tokens)\.json|chat_template\.\w+|additional_chat_templates/[^/]+")
# `_OWN`: files that the output writes itself. `_NO_PART`: files of the folder that do not belong to the model.
_OWN = ("config.json", "qcli.json", "README.md")
_NO_PART = re.compile(r"(^|/)(\.[^/]*|__pycache__)(/|$)|\.(partial|tmp|lock|incomplete)(/|$)")
_TO_RUN = re.compile(r"(.*\.(json|txt|model|jinja|py|spm|tiktoken|codes|bpe|tokenizer|vocab)|[^.]*)", re.IGNORECASE)
_POOLING = "modules.json"  # sentence-transformers: lists the folders of the steps after the model, with their small weights


@dataclass(frozen=True)
class Carried:
    """`files` are copied; `too_large` are left out for their size alone. Names are relative to the checkpoint, sorted."""

    files: list[str]
    too_large: list[str]

    @property
    def to_run(self) -> list[str]:
        """The files that a tokenizer, a template or a generation config may need. Papers, pictures and data are not among them."""
        at_top = [n for n in self.files if "/" not in n or n.startswith("additional_chat_templates/")]
        return [name for name in at_top if _TO_RUN.fullmatch(name) or _IS_TOKENIZER.fullmatch(name)]

    def notes(self, size) -> list[str]:
        """A sentence for each file that is too large. `size` gives a file's bytes."""
        return [
            f"{name} is not copied: it has {format_bytes(size(name))}, and the limit for such files is {format_bytes(MOST_BYTES)}"
            for name in self.too_large
        ]


def choose(place, weights: list[str]) -> Carried:
    """Which files of `place` are copied with the model. `weights` are the names of its weight files."""
    outputs = {name.rpartition("/")[0] for name in place.names if name.endswith("/qcli.json")}  # qcli's outputs in this folder
    pooling = _pooling_folders(place)
    files, too_large = [], []
    for name in place.names:
        folders = [name[:i] for i, c in enumerate(name) if c == "/"]
        if name in _OWN or name in weights or _NO_PART.search(name) or outputs.intersection(folders):
            continue
        if _WEIGHTS.search(name) and not _TOKENIZER.search(name) and not pooling.intersection(folders):
            continue
        (files if place.size(name) <= MOST_BYTES else too_large).append(name)
    return Carried(files, too_large)


def _pooling_folders(place) -> set[str]:
    if _POOLING not in place.names or place.size(_POOLING) > MOST_BYTES:
        return set()
    try:
        modules = parse(place.local(_POOLING).read_bytes(), _POOLING, "")
    except (OSError, CheckpointError):
        return set()  # the file is copied unchanged: another tool reads it
    paths = [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    return {path.rstrip("/") for path in paths if isinstance(path, str) and path}


def has_tokenizer(names: list[str]) -> bool:
    """Whether `names` contain a tokenizer's files."""
    return any("/" not in name and _IS_TOKENIZER.fullmatch(name) for name in names)


def tokenizer_files(names: list[str]) -> list[str]:
    """Those of `names` that are a tokenizer's, its chat templates among them; none where there is no tokenizer."""
    if not has_tokenizer(names):
        return []
    return [name for name in names if ("/" not in name and _IS_TOKENIZER.fullmatch(name)) or _BESIDE_TOKENIZER.fullmatch(name)]


def is_chat_template(name: str) -> bool:
    """Whether a file is a chat template, by its name."""
    return name.startswith(("chat_template.", "additional_chat_templates/"))
