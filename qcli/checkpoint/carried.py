"""Which files of a checkpoint go into the output as they are: everything that is not its weights in another form.

Tokenizers have many names (tekken.json, source.spm, bpe.codes, original/tokenizer.model), and so have templates, processors,
pooling folders, prompts and licences; so files are known by what they are not.
"""

import re
from dataclasses import dataclass

from qcli.errors import CheckpointError
from qcli.files.foreign_json import parse
from qcli.sizes import format_bytes

MOST_BYTES = 100_000_000  # of one file: the largest tokenizers have a third of it
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
# What the output has of its own, and what belongs to the folder and not to the model.
_OWN = ("config.json", "qcli.json", "README.md")
_NO_PART = re.compile(r"(^|/)(\.[^/]*|__pycache__)(/|$)|\.(partial|tmp|lock|incomplete)(/|$)")
_TO_RUN = re.compile(r"(.*\.(json|txt|model|jinja|py|spm|tiktoken|codes|bpe|tokenizer|vocab)|[^.]*)", re.IGNORECASE)
_POOLING = "modules.json"  # of sentence-transformers: the folders of what follows the model, small weights included


@dataclass(frozen=True)
class Carried:
    """`files` go along; `too_large` would, but for their size. Names are relative to the checkpoint, in order."""

    files: list[str]
    too_large: list[str]

    @property
    def to_run(self) -> list[str]:
        """Those that a tokenizer, a template or a generation config may be made of: not papers, pictures and data."""
        at_top = [n for n in self.files if "/" not in n or n.startswith("additional_chat_templates/")]
        return [name for name in at_top if _TO_RUN.fullmatch(name) or _IS_TOKENIZER.fullmatch(name)]

    def notes(self, size) -> list[str]:
        """A sentence on what is left behind; `size` gives a file's bytes."""
        return [
            f"{name} is not carried over: it has {format_bytes(size(name))}, and files beyond {format_bytes(MOST_BYTES)} are left"
            for name in self.too_large
        ]


def choose(place, weights: list[str]) -> Carried:
    """What of the files of `place` goes along with a model whose weights are in the files `weights`."""
    outputs = {name.rpartition("/")[0] for name in place.names if name.endswith("/qcli.json")}  # of qcli, inside this folder
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
        return set()  # carried as it is; it is for another tool
    paths = [m.get("path") for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    return {path.rstrip("/") for path in paths if isinstance(path, str) and path}


def has_tokenizer(names: list[str]) -> bool:
    """Whether a tokenizer's files are among `names`."""
    return any("/" not in name and _IS_TOKENIZER.fullmatch(name) for name in names)
