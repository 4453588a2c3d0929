import io
import os
import subprocess
import sys
from pathlib import Path

# Before any library reads them: tests never reach a hub, and never use a user's cache or token.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.pop("HF_TOKEN", None)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from qcli.runtime import threads  # noqa: E402

threads.settle()

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: a second thread only waits

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

ROOT = Path(__file__).parent.parent


def run_cli(*arguments: str, cwd: Path, env: dict[str, str] | None = None, stdin: str = "") -> subprocess.CompletedProcess:
    """`qcli ARGUMENTS` in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | (env or {})
    command = [sys.executable, "-m", "qcli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=120)


@pytest.fixture
def cli(tmp_path):
    """Runs qcli in an empty folder; nothing it prints may be a traceback."""

    def run(*arguments, **options):
        done = run_cli(*arguments, cwd=options.pop("cwd", tmp_path), **options)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture
def quick_cli(tmp_path, monkeypatch, capsys):
    """As `cli`, in this process: for the many small cases."""
    from qcli import cli as command_line

    def run(*arguments, stdin=None):
        monkeypatch.chdir(tmp_path)
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(sys, "argv", ["qcli", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            command_line.app(args=[str(a) for a in arguments], prog_name="qcli")
        captured = capsys.readouterr()
        code = stopped.value.code or 0
        return subprocess.CompletedProcess(arguments, code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The folder of what the emulator compiles, one for all workers of a run."""
    folder = tmp_path_factory.getbasetemp()
    return (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"
