"""A transformers model without weights. Its units are read from the checkpoint when they are needed, and dropped afterwards.

The model is built on the meta device, except for its buffers. transformers' own loading turns the tensors of a checkpoint into
parameters (renames, fused experts, dtypes, our quantized modules). It gets the tensors of one unit at a time.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, convert_and_load_state_dict_in_model, rename_source_key
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from qcli.checkpoint import dtypes
from qcli.checkpoint.layout import Layout
from qcli.checkpoint.model_dtype import model_dtype
from qcli.checkpoint.modules import find_linears, modules_within, reason, tied_groups, transformers_class
from qcli.checkpoint.safetensors_file import TensorInfo
from qcli.checkpoint.stored_tensor import StoredTensor, pread
from qcli.devices import pick_device
from qcli.errors import CheckpointError, UsageError, one_of
from qcli.loading.load import check_fits, check_head, quiet, stored_config, stored_layout
from qcli.loading.opening import open_checkpoint
from qcli.loading.tokenizer import read_tokenizer
from qcli.loading.transformers_quantizer import QcliConfig, QcliQuantizer, is_quantized_as_read, weight_as_read
from qcli.recipe import KEEP, Choice, Recipe
from qcli.runtime.heap import give_back
from qcli.streaming.units import Unit, find_units

_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class Skeleton:
    """A causal language model, its tokenizer, and its `units`.

    `bytes_read` counts what was read from the checkpoint so far.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        attention: str | None = None,
        head: Choice | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        """Reads headers only. `attention` names transformers' implementation; "eager" shows its probabilities. `head` quantizes
        the output head of an unquantized model, and an embedding tied to it, as they are read.

        Raises UsageError (also for a model that is no causal language model), CheckpointError, HubError, DeviceError.
        """
        one_of("dtype", dtype, ("auto", *dtypes.MODEL_DTYPES))
        self.device = pick_device(device)
        self.source = open_checkpoint(model, revision, trust_remote_code)
        self._trust_remote_code = trust_remote_code
        self.dtype = dtypes.torch_dtype(model_dtype(self.source, dtype))
        self.source.fetch_what_runs()
        with quiet():
            self._build(dtype, attention, head, trust_remote_code)
            self.tokenizer = read_tokenizer(self.source, trust_remote_code, self.model.config)
        if self.tokenizer is None:
            raise CheckpointError(f"{model} has no tokenizer", "Put its tokenizer files beside config.json.")
        self.bytes_read = 0
        self._loaded: set[str] = set()
        self._place_buffers()
        self.units = find_units(self.model)
        self._assign_tensors()
        for unit in self.units:
            if unit.resident:
                self.load(unit)

    @cached_property
    def layout(self) -> Layout:
        """Which modules are linear: those that transformers quantizes, or by names and shapes where it quantizes none."""
        if self.source.quantization:
            return self._stored_layout
        try:
            return find_linears(self.source, trust_remote_code=self._trust_remote_code)
        except CheckpointError:
            return find_linears(self.source, rules=True)

    def _build(self, dtype: str, attention: str | None, head: Choice | None, trust_remote_code: bool) -> None:
        source = self.source
        built, config = transformers_class(source, trust_remote_code)
        name = built.__name__ if built else ", ".join(source.architectures or ["model of no known class"])
        if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
            name += " with is_decoder false, an encoder"
        if built is None or config.is_encoder_decoder or not name.endswith(_CAUSAL):
            raise UsageError(
                f"{source.label} is a {name}, expected a causal language model, which predicts the next token",
                "Give a model such as a Llama, Qwen, Gemma or GPT, in a form that transformers knows.",
            )
        self._stored_layout = stored_layout(source, built, config)
        check_fits(source, self._stored_layout)
        stored = source.quantization
        options = {} if attention is None else {"attn_implementation": attention}
        try:
            with init_empty_weights(include_buffers=False), no_init_weights(), modules_within(source):
                config.dtype = self.dtype
                self.model = built._from_config(config, dtype=self.dtype, **options).eval().requires_grad_(False)
        except Exception as e:  # each model class raises its own kinds for a wrong config
            raise CheckpointError(
                f"{source.label}: {built.__name__} cannot be built from config.json: {reason(e)}", "Check the config's fields."
            ) from e
        self.quantizer = None
        if stored:
            self.quantizer = QcliQuantizer(stored_config(source, self._stored_layout, dtype), pre_quantized=True)
        elif head is not None:
            check_head(self._stored_layout, source.label)
            self.output_head = self._stored_layout.head
            asked = QcliConfig(recipe=Recipe(Choice(KEEP), head=head), head=self.output_head)
            self.quantizer = QcliQuantizer(asked, pre_quantized=False)
        if self.quantizer is not None:
            self.quantizer.preprocess_model(model=self.model, dtype=self.dtype)
        self._config = LoadStateDictConfig(
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            hf_quantizer=self.quantizer,
            device_map={"": self.device},
            weight_mapping=get_model_conversion_mapping(self.model, None, self.quantizer),
        )

    def _place_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self.device))

    def _assign_tensors(self) -> None:
        """Gives each unit the tensors of the checkpoint that its parameters are made of."""
        mapping, state = self._config.weight_mapping, self.model.state_dict()
        renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
        converters = [t for t in mapping if isinstance(t, WeightConverter)]
        prefix = self.model.base_model_prefix
        owners = {name: unit for unit in self.units for name, _, _ in unit.weights()}
        blocks = [unit for unit in self.units if unit.index is not None]
        self._origin: dict[str, list[TensorInfo]] = {}
        for name, info in self.source.tensors.items():
            renamed, _ = rename_source_key(name, renamings, converters, prefix, state)
            if renamed not in state and name in state:
                renamed = name
            unit = owners.get(renamed) or next((b for b in blocks if renamed.startswith(f"{b.name}.")), None)
            if unit is not None:
                unit.tensors.append(info)
                self._origin.setdefault(renamed, []).append(info)
        for name in [name for unit in self.units for name, _, _ in unit.weights() if name not in self._origin]:
            path, _, _ = name.rpartition(".")
            if is_quantized_as_read(self.model, path) and f"{path}.weight" in self._origin:
                self._origin[name] = self._origin[f"{path}.weight"]
        groups = tied_groups(self.model.all_tied_weights_keys)
        for unit in self.units:
            for name, _, _ in unit.weights():
                if name not in self._origin:
                    stored = next((one for one in sorted(groups.get(name, ())) if one in self._origin), None)
                    if stored is not None:
                        unit.ties.append((name, stored))

    @property
    def embedding(self) -> Unit:
        """The unit that token ids enter."""
        module = self.model.get_input_embeddings()
        return next(unit for unit in self.units if unit.module is module)

    @property
    def blocks(self) -> list[Unit]:
        """The units that are blocks, in their order."""
        return [unit for unit in self.units if unit.index is not None]

    def origin(self, name: str) -> list[TensorInfo]:
        """The tensors of the checkpoint that the parameter or buffer `name` is made of; none for one that belongs to another."""
        return self._origin.get(name, [])

    def is_loaded(self, unit: Unit) -> bool:
        """Whether the weights of `unit` are in memory."""
        return unit.name in self._loaded

    def load(self, unit: Unit) -> None:
        """Reads the weights of `unit`. Raises CheckpointError where they are missing or misshaped."""
        if self.is_loaded(unit):
            return
        borrowed = [origin for _, source in unit.ties for origin in self._origin.get(source, ())]
        self._read(list({info.name: info for info in (*unit.tensors, *borrowed)}.values()))
        for name, origin in unit.ties:
            self._tie(name, origin)
        self._loaded.add(unit.name)
        empty = [name for name, module, attribute in unit.weights() if getattr(module, attribute).is_meta]
        if empty:
            raise CheckpointError(
                f"{self.source.label} lacks {len(empty)} tensors of {unit.name}: {', '.join(empty[:5])}", self.source.again()
            )

    def _read(self, tensors: Iterable[TensorInfo]) -> None:
        with ExitStack() as opened:
            loads = {file: pread(opened.enter_context(self.source.open(file))) for file in {info.file for info in tensors}}
            state = {info.name: StoredTensor(info, loads[info.file]) for info in tensors}
            with quiet(), torch.no_grad():  # not in inference mode, whose tensors autograd refuses
                loaded, _ = convert_and_load_state_dict_in_model(self.model, state, self._config)
        self.bytes_read += sum(info.nbytes for info in tensors)
        if loaded.conversion_errors or loaded.mismatched_keys:
            wrong = sorted(loaded.conversion_errors) or sorted(str(key[0]) for key in loaded.mismatched_keys)
            raise CheckpointError(f"{self.source.label} does not fit its model: {', '.join(wrong[:5])}", self.source.again())

    def _tie(self, name: str, origin: str) -> None:
        """Makes the parameter `name` the same as `origin`, which is dropped again if its own unit is not loaded."""
        module, attribute = _holder(self.model, name)
        owner, there = _holder(self.model, origin)
        weight = getattr(owner, there)
        setattr(module, attribute, weight)
        unit = next((u for u in self.units if any(n == origin for n, _, _ in u.weights())), None)
        if unit is not None and not self.is_loaded(unit):
            setattr(owner, there, _meta(weight))
            weight_as_read(owner, self.dtype)

    def unload(self, unit: Unit) -> None:
        """Drops the weights of `unit`."""
        if unit.resident or not self.is_loaded(unit):
            return
        for _, module, name in unit.weights():
            setattr(module, name, _meta(getattr(module, name)))
        weight_as_read(unit.module, self.dtype)
        self._loaded.remove(unit.name)
        give_back()


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
