"""The model that a command is about."""

from qcli.errors import UsageError


def asked_model(model: str | None, example: str) -> str:
    """`model`, or a usage error that shows one working example where none was given. Raises UsageError."""
    if model is None:
        raise UsageError("no model was given, expected a folder or a model id on the hub", f"Such as: {example}")
    return model
