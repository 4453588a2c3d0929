"""qcli: quantize, run and inspect large language models. The verbs of the command line, in Python.

Names are imported on first use, so `import qcli` loads neither torch nor transformers. Where both qcli and transformers are
imported, transformers reads the format `qcli`.
"""

from importlib import import_module

from qcli.loading.announcing import announce

_EXPORTS = {
    "dequantize": "qcli.quantization.dequantize",
    "merge": "qcli.quantization.merge",
    "quantize": "qcli.quantization.quantize",
    "load": "qcli.loading.load",
    "evaluate": "qcli.evaluation.evaluate",
    "estimate_memory": "qcli.memory.estimate",
    "finetune": "qcli.finetuning.finetune",
    "inspect_outliers": "qcli.outliers.inspect_outliers",
    "QcliError": "qcli.errors",
}

__all__ = [
    "QcliError",
    "__version__",
    "dequantize",
    "estimate_memory",
    "evaluate",
    "finetune",
    "inspect_outliers",
    "load",
    "merge",
    "quantize",
]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("qcli")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0.0.0"


def __getattr__(name: str):
    if name == "__version__":
        globals()[name] = found = _version()
        return found
    if name not in _EXPORTS:
        raise AttributeError(f"module 'qcli' has no attribute {name!r}")
    import_module("qcli.runtime.threads").settle()  # before the verb imports torch
    return getattr(import_module(_EXPORTS[name]), name)


announce()
