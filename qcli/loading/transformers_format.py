"""The format `qcli`, registered with transformers: `AutoModelForCausalLM.from_pretrained` reads it where qcli is imported.

transformers gives the `quantization_config` of config.json, and the model on the meta device. What is stored of each module is read
from headers then, as `qcli.load` reads it, and the same quantizer puts the modules in. Importing this costs nothing beside
transformers, since it happens wherever both libraries are imported.
"""

import re
from pathlib import Path

from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qcli.errors import UsageError

NAME = "qcli"


@register_quantization_config(NAME)
class QcliFormatConfig(QuantizationConfigMixin):
    """The `quantization_config` of a config.json, as it stands there."""

    def __init__(self, **fields):
        self.quant_method = NAME
        self.fields = {**fields, "quant_method": NAME}

    def to_dict(self) -> dict:
        """The fields."""
        return dict(self.fields)


@register_quantizer(NAME)
class QcliFormatQuantizer(HfQuantizer):
    """Reads what is stored, and leaves the rest to `QcliQuantizer`, which `modules` is from then on."""

    requires_calibration = True  # a model is made by `qcli quantize`, never by from_pretrained
    modules = None

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        from qcli import formats
        from qcli.loading.load import check_fits, stored_config, stored_layout
        from qcli.loading.opening import open_checkpoint
        from qcli.loading.transformers_quantizer import QcliQuantizer

        if not checkpoint_files:
            raise UsageError("the format qcli is read from files, and from_pretrained was given none", "Give a folder or a hub id.")
        name = model.config.name_or_path
        is_here = Path(name).is_dir()
        folder = str(Path(checkpoint_files[0]).parent) if is_here else name
        source = open_checkpoint(folder, None if is_here else model.config._commit_hash, trust_remote_code=False)
        layout = stored_layout(source, type(model), model.config)
        check_fits(source, layout)
        self.modules = QcliQuantizer(stored_config(source, layout, "auto"), pre_quantized=True)
        self.modules._process_model_before_weight_loading(model)
        # What other readers must not meet, and what no module holds: tables and descriptions.
        given = {Path(file).name for file in checkpoint_files}
        checkpoint_files += [str(source.place.local(file)) for file in source.files if file not in given]
        in_module = formats.get(NAME).in_module
        unheld = {re.escape(name.rpartition(".")[2]) for name, info in source.tensors.items() if not in_module(info)}
        model._keys_to_ignore_on_load_unexpected |= {rf"\.{last}$" for last in unheld}
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        return self.modules._process_model_after_weight_loading(model)

    def get_weight_conversions(self):
        """See HfQuantizer."""
        return self.modules.get_weight_conversions()

    def validate_environment(self, *_, device_map=None, **__):
        """See HfQuantizer. Raises UsageError where a device map leaves modules to the disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError("the device map leaves modules to the disk", "Raise max_memory, or choose fewer bits.")

    def is_serializable(self) -> bool:
        """What is loaded is on disk already."""
        return False

    @property
    def is_trainable(self) -> bool:
        return True  # adapters are
