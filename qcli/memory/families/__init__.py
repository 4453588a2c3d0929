"""Parameter names and shapes of model families, from config.json alone. One family is one file, found by its MODEL_TYPES.

Each file has `shapes(config, model)`, which tells `model`, a Shapes, every parameter that transformers 5 builds from `config`, a
ModelConfig. Tied weights are told once.
"""

from functools import cache
from importlib import import_module
from pathlib import Path


@cache
def families() -> dict[str, str]:
    """model_type -> the module of its family."""
    names = [f"qcli.memory.families.{path.stem}" for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))]
    return {model_type: name for name in names for model_type in import_module(name).MODEL_TYPES}
