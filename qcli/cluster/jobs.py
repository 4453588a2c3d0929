"""What runs on a worker. A job is a class with methods that take and give plain data. It knows nothing of the engine.

A job is named as "module:Class", and made on the worker from a specification. Its methods take a Told first, by which they say how
far they are: the driver asks for that from time to time, in another thread.
"""

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from qcli.cluster.installed import fingerprint
from qcli.errors import QcliError


@dataclass
class Told:
    """Bytes of work that are done in the call `number`, and what is worked on. Threads may call `advance`."""

    number: int
    done: int = 0
    name: str = ""
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def advance(self, count: int, name: str) -> None:
        """`count` more bytes are finished; they belong to `name`. An Advance of qcli.progress."""
        with self._lock:
            self.done, self.name = self.done + count, name


@dataclass(frozen=True)
class Failed:
    """An error meant for the user, on its way from a worker."""

    kind: str
    message: str
    hint: str | None
    host: str


@dataclass(frozen=True)
class Hello:
    """A worker's first words."""

    host: str
    pid: int
    installed: dict[str, str]


@dataclass(frozen=True)
class WorkerSummary:
    """What a worker has done, for reports. `bytes` are those of progress, `seconds` those with a task."""

    host: str
    threads: int
    tasks: int
    bytes: int
    seconds: float


class Host:
    """Makes a job and calls its methods. Errors that are meant for users come back as Failed."""

    def __init__(self, kind: str, threads: int):
        self.kind, self.threads, self.calls = kind, threads, 0
        self.told: Told = Told(0)
        self.job: Any = None

    def hello(self) -> Hello:
        """Who this is."""
        return Hello(socket.gethostname(), os.getpid(), fingerprint())

    def begin(self, spec: Any) -> Any:
        """Makes the job. Returns None, or Failed."""
        return self._guarded(lambda: self._make(spec))

    def _make(self, spec: Any) -> None:
        module, name = self.kind.split(":")
        self.job = getattr(import_module(module), name)(spec)

    def call(self, number: int, method: str, *arguments: Any) -> Any:
        """What a method of the job returns for a Told and the arguments, or Failed. `number` is the call's, for `state`."""
        self.told = Told(number)
        return self._guarded(lambda: getattr(self.job, method)(self.told, *arguments))

    def state(self) -> tuple[int, int, str]:
        """(number of the call, bytes that are done in it, what it works on)."""
        told = self.told
        return told.number, told.done, told.name

    def _guarded(self, call: Callable[[], Any]) -> Any:
        import torch

        torch.set_num_threads(self.threads)  # which is each thread's own
        try:
            return call()
        except QcliError as e:
            return Failed(type(e).__name__, e.message, e.hint, socket.gethostname())
