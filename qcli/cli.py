"""The command line: one Typer app, one command per file in commands/, and the boundary that turns errors into messages."""

import atexit
import functools
import gc
import os
import signal
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from qcli import console
from qcli.errors import QcliError, QcliWarning
from qcli.runtime import threads

app = typer.Typer(
    help="Quantize, run and inspect large language models on the hardware you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from qcli import __version__

        console.out(f"qcli {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize, run and inspect large language models on the hardware you have."""


def _boundary(command):
    """Turns a QcliError into a message and an exit code. QCLI_TRACEBACK=1 shows the traceback instead."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            command(*args, **kwargs)
        except QcliError as e:
            if os.environ.get("QCLI_TRACEBACK"):
                raise
            console.error(e.message, e.hint)
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            console.error("interrupted")
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output has ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)

    return run


for _path in sorted(Path(__file__).with_name("commands").glob("[a-z]*.py")):
    _module = import_module(f"qcli.commands.{_path.stem}")
    app.command(_path.stem.replace("_", "-"))(_boundary(getattr(_module, _path.stem)))


def _terminate(signum, frame):
    raise KeyboardInterrupt


def _warn(message: Warning, category: type[Warning], filename: str, line: int, *rest) -> None:
    """Shows a warning of qcli without a line of code. Warnings of libraries keep it."""
    if issubclass(category, QcliWarning):
        console.warn(str(message))
    else:
        console.say(warnings.formatwarning(message, category, filename, line).rstrip())


def main() -> None:
    """Entry point of `qcli`."""
    warnings.showwarning = _warn
    signal.signal(signal.SIGTERM, _terminate)
    # The libraries make a million objects that stay. With Python's default, the search for cycles among them takes a fourth of
    # the import time.
    gc.set_threshold(100_000, 20, 100)
    # And Python would search through all of them again before it ends, for a second or two.
    atexit.register(gc.freeze)
    threads.settle()
    with threads.following():
        app(prog_name="qcli")


if __name__ == "__main__":
    main()
