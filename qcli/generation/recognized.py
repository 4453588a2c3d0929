"""What a step of decoding that is not transformers' own takes from a model: the readings of its layers (structure.py), the one that
agrees with transformers on a prompt (compare.py), and what stands before the first layer and behind the last.
"""

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from qcli.generation import compare, positions
from qcli.generation.compare import Tolerance, choose
from qcli.generation.first_prompt import Seen, Storing, watching
from qcli.generation.graph import supported
from qcli.generation.lean_step import MOST_TOKENS, Caches
from qcli.generation.step import Unsupported, cache_argument
from qcli.generation.structure import Block, attention_of, candidates, check_config, norm_of
from qcli.nn.quantized_embedding import QuantizedEmbedding

_RANDOM = 2 * MOST_TOKENS  # tokens that tell the readings apart
Rope = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Recognized:
    """The layers of `model` in every reading that their modules allow. `linear` prepares a linear layer for the step. Raises
    Unsupported for a model that has no reading."""

    def __init__(self, model, linear: Callable):
        if not supported(model):
            raise Unsupported
        self.model, self.config = model, model.config
        embedding = model.get_input_embeddings()
        self.dtype = embedding.dtype if isinstance(embedding, QuantizedEmbedding) else embedding.weight.dtype
        if not compare.known(self.dtype):
            raise Unsupported
        check_config(self.config)
        self.decoder = model.get_decoder()
        kinds = DynamicCache(config=self.config).layers
        self.windows = [each.sliding_window if isinstance(each, DynamicSlidingWindowLayer) else 0 for each in kinds]
        lists = [child for child in self.decoder.children() if isinstance(child, nn.ModuleList)]
        if [len(each) for each in lists] != [len(kinds)]:
            raise Unsupported
        (self.decoder_layers,) = lists
        self.readings = [list(candidates(layer, self.config, linear)) for layer in self.decoder_layers]
        if len({options[0].attention.out.out_features for options in self.readings}) != 1:
            raise Unsupported
        self.vocabulary = embedding.num_embeddings
        if (positions.ends(model)[1] or _RANDOM) < _RANDOM:
            raise Unsupported
        self.head = linear(model.get_output_embeddings())
        self.rounding = [module for module in model.modules() if getattr(module, "rounds_activations", False)]
        self.tolerance = Tolerance(self.dtype, bool(self.rounding))
        self.embed: Callable[[torch.Tensor, object], torch.Tensor] | None = None
        self.rope: list[Rope | None] = []

    def watching(self):
        """What the layers get and give meanwhile: see first_prompt.py."""
        return watching(self.decoder, self.decoder_layers, [attention_of(layer) for layer in self.decoder_layers])

    def random_text(self) -> torch.Tensor:
        """ids int64 [1, _RANDOM], always the same."""
        return torch.randint(self.vocabulary, (1, _RANDOM), generator=torch.Generator().manual_seed(0))

    def caches(self, length: int, dtype: torch.dtype) -> Caches:
        """Empty caches of all layers, with room for `length` positions."""
        attention = [options[0].attention for options in self.readings]
        sizes = [a.kv_heads for a in attention], [a.head_dim for a in attention], self.windows
        return Caches(*sizes, dtype, length, self.model.device)

    def read(self, ids: torch.Tensor, caches: Caches) -> torch.Tensor:
        """Reads ids int64 [1, tokens] with transformers, into `caches`. Returns logits float32 [1, vocabulary] after the last."""
        cache = Cache(layers=[Storing(layer) for layer in caches.layers])
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        options: dict[str, object] = {cache_argument(self.model): cache}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = 1
        return self.model(input_ids=ids, position_ids=places, use_cache=True, **options).logits[:, -1].float()

    def agreeing(self, seen: Seen, ids: torch.Tensor, caches: Caches, run_layer: Callable) -> list[Block]:
        """The reading of each layer that computes what was seen of `ids`, by `run_layer` (see lean_step.run_layer). Finds `embed`
        and `rope`, too. Raises Unsupported."""
        self.rope = self._ropes(seen)
        self.embed = self._embed_of(ids[0], seen.inputs[0][0].float())
        start = ids.shape[1] - min(MOST_TOKENS, ids.shape[1])
        return choose(self.readings, seen, caches, self.tables(caches.length), start, self.tolerance, run_layer)

    def tables(self, length: int) -> list:
        """(cos, sin) float32 [length, rot_dim] of each layer, None for one without rotation."""
        places = torch.arange(length, device=self.model.device)[None]
        made = {rope: rope(places) for rope in set(self.rope) if rope is not None}
        return [made.get(rope) for rope in self.rope]

    def last_norm(self):
        """The norm before the head, None without one. Raises Unsupported for one that is not recognised."""
        for name, module in reversed(list(self.decoder.named_children())):
            if "norm" in name or name == "ln_f":
                return norm_of(module, self.head.in_features)
        return None

    def finished(self, logits: torch.Tensor) -> torch.Tensor:
        """In place: what models do with the head's product."""
        scale = getattr(self.config, "logit_scale", None) or 1 / (getattr(self.config, "logits_scaling", None) or 1)
        softcap = getattr(self.config, "final_logit_softcapping", None)
        if scale != 1:
            logits.mul_(scale)
        if softcap:
            logits.div_(softcap).tanh_().mul_(softcap)
        return logits

    def _ropes(self, seen: Seen) -> list[Rope | None]:
        """For each layer, the function of positions int64 [1, count] that gives its (cos, sin) float32 [count, rot_dim]."""
        known: dict[tuple, Rope] = {}
        for rope in seen.ropes:
            if rope is not None and rope not in known:
                module, more = rope
                if module is None:
                    raise Unsupported
                known[rope] = _rope(module, more)
        return [None if rope is None else known[rope] for rope in seen.ropes]

    def _embed_of(self, ids: torch.Tensor, seen: torch.Tensor) -> Callable[[torch.Tensor, object], torch.Tensor]:
        """The function of (ids, start) that gives the first layer's input, `seen` for the last of these ids. Raises Unsupported."""
        embedding, tokens = self.model.get_input_embeddings(), len(seen)
        rows = embedding(ids[None, -tokens:])[0].float()
        if rows.shape != seen.shape:
            raise Unsupported
        places = torch.arange(len(ids) - tokens, len(ids), device=ids.device)
        for module in self.decoder.children():
            if type(module) is nn.Embedding and module is not embedding and module.num_embeddings >= len(ids):
                if self.tolerance.agree(rows + module(places).float(), seen):
                    return lambda ids, start: embedding(ids) + module(start + torch.arange(len(ids), device=ids.device))
        factor = float((rows * seen).sum() / rows.square().sum())
        if not self.tolerance.agree(rows * factor, seen):
            raise Unsupported
        factor = 1.0 if torch.equal(rows, seen) else factor
        return lambda ids, start: embedding(ids) * factor


def _rope(module: nn.Module, kind: tuple) -> Rope:
    def tables(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = module(torch.zeros(1, 1, 1, device=places.device), places, *kind)
        return cos[0].float().contiguous(), sin[0].float().contiguous()

    return tables
