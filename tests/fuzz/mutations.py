"""Damages a model's folder in the way of other tools, other versions, manual edits and bad disks.

A mutation gets a random source, edits the folder in place, and returns a sentence about what it did.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
import transformers
from safetensors.torch import load_file, save_file

HOSTILE = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    0.5,
    -0.5,
    1e-9,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**31 - 1,
    2**62,
    2**63,
    2**70,
    "",
    "x",
    "auto",
    "0",
    "64",
    "float8_e4m3fn",
    "float16",
    "\x00",
    "../x",
    "a" * 300,
    "é\u2028",
    [],
    [1],
    ["x"],
    [None],
    [[]],
    [2**62, 2],
    {},
    {"a": 1},
    {"": None},
    {"rope_type": "yarn"},
    [{"a": [1]}],
)
_MORE_OF_CONFIG = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "quantization_config",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "layer_types",
    "num_labels",
    "id2label",
    "text_config",
    "vision_config",
    "sliding_window",
    "head_dim",
    "num_experts",
    "num_local_experts",
    "is_encoder_decoder",
    "tie_word_embeddings",
    "pad_token_id",
    "eos_token_id",
    "attn_implementation",
    "torchscript",
    "pruned_heads",
    "transformers_version",
    "use_cache",
    "output_attentions",
    "return_dict",
    "chunk_size_feed_forward",
    "mlp_bias",
    "attention_bias",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "pretraining_tp",
    "model_type",
    "name_or_path",
)
_MORE_OF_TOKENIZER = (
    "tokenizer_class",
    "model_max_length",
    "chat_template",
    "eos_token",
    "bos_token",
    "pad_token",
    "unk_token",
    "auto_map",
    "added_tokens_decoder",
    "extra_special_tokens",
    "padding_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
)
_MORE_OF_GENERATION = tuple(sorted(transformers.GenerationConfig().to_dict()))


def _json_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def _spots(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in a JSON tree, except for the thousands in a vocabulary."""
    found = [path] if path else []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for count, (key, item) in enumerate(inside):
        if count == 60:
            break
        found += _spots(item, (*path, key))
    return found


def _at(value, path: tuple):
    for key in path:
        value = value[key]
    return value


def _changed(random: Random, old: object) -> object:
    """A value to replace `old`: of another type, or close to it."""
    near = []
    if isinstance(old, bool):
        near = [not old, str(old).lower(), int(old)]
    elif isinstance(old, (int, float)):
        near = [old + 1, old - 1, -old, old * 2, float(old), str(old), [old], old * 10**6]
    elif isinstance(old, str):
        near = [old + "x", old.upper(), [old], {"name": old}, old[:-1]]
    elif isinstance(old, list):
        near = [old[:-1], old + old, {"items": old}, old[0] if old else 0, [old]]
    elif isinstance(old, dict):
        near = [list(old), list(old.items()), str(old)[:50], {**old, "x": 1}]
    return random.choice(near) if near and random.random() < 0.4 else random.choice(HOSTILE)


def _edit_tree(random: Random, value: dict, more: tuple[str, ...]) -> str:
    spots = _spots(value)
    choice = random.random()
    if more and (choice < 0.25 or not spots):
        key = random.choice(more)
        value[key] = random.choice(HOSTILE)
        return f"{key} = {value[key]!r:.80}"
    if not spots:
        return "nothing"
    path = random.choice(spots)
    parent, key = _at(value, path[:-1]), path[-1]
    if choice < 0.4:
        del parent[key]
        return f"without {path}"
    parent[key] = _changed(random, parent[key])
    return f"{path} = {parent[key]!r:.80}"


def json_field(random: Random, folder: Path) -> str:
    """Damages a field of one of the JSON files."""
    path = random.choice(_json_files(folder))
    if random.random() < 0.5:
        path = folder / "config.json"
    value = json.loads(path.read_text())
    more = {
        "config.json": _MORE_OF_CONFIG,
        "tokenizer_config.json": _MORE_OF_TOKENIZER,
        "generation_config.json": _MORE_OF_GENERATION,
    }.get(path.name, ())
    if path.name == "config.json" and "quantization_config" in value and random.random() < 0.4:
        what = "quantization_config: " + _edit_tree(random, value["quantization_config"], ())
    elif isinstance(value, dict):
        what = _edit_tree(random, value, more)
    else:
        return "nothing"
    path.write_text(json.dumps(value))
    return f"{path.name}: {what}"


def json_root(random: Random, folder: Path) -> str:
    """Replaces the whole content of a JSON file by another value, or by no JSON."""
    path = random.choice(_json_files(folder))
    good = path.read_bytes()
    name, data = random.choice(
        [
            ("list", b"[]"),
            ("null", b"null"),
            ("number", b"3"),
            ("string", b'"x"'),
            ("empty object", b"{}"),
            ("empty", b""),
            ("cut", good[: random.randrange(len(good))]),
            ("byte order mark", b"\xef\xbb\xbf" + good),
            ("no UTF-8", b'{"\xff": 1}'),
            ("UTF-16", good.decode().encode("utf-16")),
            ("deep", b"[" * 50_000),
            ("long number", b'{"a": ' + b"9" * 5000 + b"}"),
            ("HTML", b"<html>404 not found</html>"),
            ("nul bytes", bytes(len(good))),
        ]
    )
    path.write_bytes(data)
    return f"{path.name}: {name}"


def header(random: Random, folder: Path) -> str:
    """Damages the header of a safetensors file."""
    path = random.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    value = json.loads(data[8 : 8 + length])
    what = _edit_tree(random, value, ())
    raw = json.dumps(value).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])
    return f"header of {path.name}: {what}"


def file_bytes(random: Random, folder: Path) -> str:
    """Cuts, extends or flips bytes of any file."""
    path = random.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    data = bytearray(path.read_bytes())
    choice = random.random()
    if choice < 0.3:
        data = data[: random.randrange(len(data) + 1)]
    elif choice < 0.45:
        data += random.randbytes(random.randrange(1, 9))
    else:
        for _ in range(random.choice((1, 1, 8))):
            if data:
                data[random.randrange(min(len(data), random.choice((16, 2000, 10**9))))] = random.randrange(256)
    path.write_bytes(data)
    return f"bytes of {path.name}"


def quant_state(random: Random, folder: Path) -> str:
    """Damages the JSON inside a quant_state tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        state = load_file(path)
        names = [name for name in state if ".quant_state." in name]
        if names:
            name = random.choice(names)
            value = json.loads(bytes(state[name].tolist()))
            what = _edit_tree(random, value, ("nested_offset", "nested_blocksize", "nested_dtype", "offset"))
            state[name] = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
            save_file(state, path, {"format": "pt"})
            return f"{name}: {what}"
    return json_field(random, folder)


def tensor(random: Random, folder: Path) -> str:
    """Removes, renames, casts or reshapes a tensor, or adds one."""
    path = random.choice(sorted(folder.glob("*.safetensors")))
    state = load_file(path)
    name = random.choice(sorted(state))
    old = state[name]
    choice = random.choice(("lost", "renamed", "cast", "cut", "flat", "extra", "empty", "not finite"))
    if choice in ("lost", "renamed"):
        del state[name]
        if choice == "renamed":
            state[random.choice((f"model.{name}", name.replace(".", "_"), name + ".weight", name.upper()))] = old
    elif choice == "cast":
        dtype = random.choice(
            (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.float64, torch.bool)
        )
        state[name] = old.float().to(dtype)
    elif choice == "cut" and old.dim():
        state[name] = old[: max(len(old) - 1, 0)].clone()
    elif choice == "flat":
        state[name] = old.reshape(-1).clone()
    elif choice == "extra":
        extra = random.choice(
            ("model.layers.9.mlp.up_proj.weight", f"{name}_scale_inv", f"{name}.absmax", f"{name.removesuffix('weight')}SCB")
        )
        state[extra] = torch.ones(3)
    elif choice == "empty":
        state[name] = old.new_empty((0, *old.shape[1:]))
    elif choice == "not finite" and old.is_floating_point() and old.numel():
        state[name] = old.clone()
        state[name].view(-1)[0] = float("nan")
    save_file(state, path, {"format": "pt"})
    return f"tensor {name}: {choice}"


def files(random: Random, folder: Path) -> str:
    """Removes or renames a file, replaces it by a folder, or adds files."""
    path = random.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    choice = random.choice(("lost", "renamed", "folder", "link", "adapter", "subfolder", "twice", "unreadable index"))
    if choice in ("lost", "folder", "link"):
        path.unlink()
        if choice == "folder":
            path.mkdir()
        elif choice == "link":
            path.symlink_to(folder / "nowhere")
    elif choice == "renamed":
        path.rename(folder / random.choice((f"x{path.name}", path.name.replace("model", "model.fp16"), path.name.upper())))
    elif choice == "adapter":
        value = {"peft_type": "LORA", "base_model_name_or_path": "a/b", "r": 4}
        (folder / "adapter_config.json").write_text(json.dumps(value if random.random() < 0.5 else [value]))
        save_file({"base_model.model.x.lora_A.weight": torch.ones(4, 4)}, folder / "adapter_model.safetensors")
    elif choice == "subfolder":
        (folder / "original" / "deep").mkdir(parents=True)
        (folder / "original/deep/tokenizer.model").write_bytes(b"x")
        (folder / "config.json.d").mkdir()
    elif choice == "twice":
        os.link(path, folder / f"copy-{path.name}")
    elif choice == "unreadable index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    return f"{choice}: {path.name}"


KINDS: tuple[tuple[Callable[[Random, Path], str], int], ...] = (
    (json_field, 9),
    (json_root, 2),
    (header, 3),
    (file_bytes, 2),
    (quant_state, 3),
    (tensor, 4),
    (files, 2),
)


def mutate(random: Random, folder: Path) -> str:
    """Applies one or two mutations to `folder`. Returns what they did."""
    done = []
    for _ in range(1 if random.random() < 0.85 else 2):
        kind = random.choices([k for k, _ in KINDS], [w for _, w in KINDS])[0]
        try:
            done.append(kind(random, folder))
        except Exception as e:  # the second mutation cannot read what the first left
            done.append(f"({kind.__name__} not possible: {type(e).__name__})")
    return "; ".join(done)
