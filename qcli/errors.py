"""The errors that a user can see. One boundary, in `cli.py`, turns each into a message, a hint and an exit code.

A message names the thing, what was found and what was expected. The hint says what to do next.
"""

_PROBLEMS = 20  # the most problems that a message lists


class QcliError(Exception):
    """Base of every error whose message is meant for the user. `exit_code` is what the command line returns."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QcliError):
    """The command line itself is wrong: an unknown method, an option out of range."""

    exit_code = 2


class CheckpointError(QcliError):
    """A checkpoint on disk is missing, damaged or not what it claims to be."""


class HubError(QcliError):
    """The model hub refused the request, is unreachable, or does not know the model."""


class DeviceError(QcliError):
    """The requested device is missing or lacks memory."""


class ClusterError(QcliError):
    """A cluster does not answer, or its workers cannot do the work."""


class KernelError(QcliError):
    """A CUDA kernel cannot be compiled, loaded or launched."""


class NotCompiledError(KernelError):
    """The package does not contain a compiled CUDA kernel, and there is no nvcc to compile it."""


class NonFiniteError(QcliError):
    """A weight holds NaN or infinity."""


class PlanError(QcliError):
    """A run cannot start. `problems` lists every reason, each in one sentence."""

    def __init__(self, subject: str, problems: list[str], hint: str | None = None):
        self.problems = list(problems)
        if len(self.problems) == 1:
            message = f"{subject}: {self.problems[0]}"
        else:
            listed = self.problems[:_PROBLEMS]
            message = f"{subject}: {len(self.problems)} problems:" + "".join(f"\n  - {p}" for p in listed)
            if len(self.problems) > len(listed):
                message += f"\n  and {len(self.problems) - len(listed):,} more"
        super().__init__(message, hint)


class Interrupted(QcliError):
    """Ctrl-C or SIGTERM stopped the run."""

    exit_code = 130


class QcliWarning(UserWarning):
    """Something works less well than it could. The message says what, and what to do."""


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raises UsageError unless `value`, given as the option `name`, is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has no text."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def together(what: str, names: list[str]) -> str:
    """One phrase for many things of a kind. It names the first five."""
    return f"{len(names):,} {what}: {', '.join(names[:5])}" + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
