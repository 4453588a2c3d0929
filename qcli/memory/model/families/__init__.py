"""Parameter names and shapes of model families, from config.json alone. One family is one file, found by its MODEL_TYPES.

Each file has `shapes(config, model)`. It adds to `model`, a Shapes, every parameter that transformers 5 builds from `config`, a
ModelConfig. Tied weights are added once.
"""

from functools import cache
from importlib import import_module
from pathlib import Path

from qcli.memory.model.config import ModelConfig


@cache
def families() -> dict[str, str]:
    """model_type -> the module of its family."""
    names = [f"{__name__}.{path.stem}" for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))]
    return {model_type: name for name in names for model_type in import_module(name).MODEL_TYPES}


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]] | None:
    """Name -> shape of every parameter; None for a model type without a family. Raises UsageError for a missing field."""
    from qcli.memory.model.families._shapes import Shapes

    name = families().get(config.model_type)
    if name is None:
        return None
    model = Shapes()
    import_module(name).shapes(config, model)
    return model.found
