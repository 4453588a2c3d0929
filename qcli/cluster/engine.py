"""Ray, behind the few words that qcli needs: nodes, workers on them, calls that end or die. Nothing else imports it.

A worker is an actor with a Host (qcli.cluster.jobs). Ray ends it when the process that started it ends, however that happens.
"""

import logging
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from io import TextIOBase
from typing import Any

from qcli.cluster.jobs import Host
from qcli.errors import ClusterError, UsageError, first_line

LOCAL, AUTO = "local", "auto"
_STORE = 200_000_000  # bytes of the object store of a cluster that qcli starts: plans and statistics pass through it
_SECONDS = 10.0  # for a connection
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class Node:
    """A machine of the cluster, or what one of its raylets offers."""

    id: str
    address: str
    cpus: int
    gpus: int


class Died(Exception):
    """The worker of a call is no more."""


class _Sink(TextIOBase):
    """Takes what Ray prints about workers that die, which qcli says itself."""

    def write(self, text: str) -> int:
        return len(text)


class Engine:
    """A connection to the cluster at `address`: host:port, `auto` for the one that this machine belongs to, `local` for one on this
    machine alone that ends with the connection. Use as a context manager. Raises ClusterError, UsageError."""

    def __init__(self, address: str):
        self.address = address

    def __enter__(self) -> "Engine":
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError:
            raise ClusterError("--cluster needs Ray, which is not installed", "Install it: pip install 'qcli[cluster]'.") from None
        logging.getLogger("ray").setLevel(logging.ERROR)  # which the import sets
        self._ray, self._leaving = ray, ExitStack()
        self._leaving.enter_context(redirect_stdout(_Sink()))
        if ray.is_initialized():  # by the program that calls qcli: it stays connected
            return self
        options: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        if self.address == LOCAL:
            os.environ.setdefault("RAY_worker_niceness", "0")  # else they yield to whatever else runs here
            options |= {"include_dashboard": False, "object_store_memory": _STORE, "address": LOCAL}
        else:
            options |= {"address": self.address}
            if self.address != AUTO:
                _check_listens(self.address)
                options |= _own_address(self.address)
        try:
            ray.init(**options)
        except (ConnectionError, TimeoutError, RuntimeError, ValueError, AssertionError) as e:
            self._leaving.close()
            raise _unreachable(self.address, e) from e
        self._leaving.callback(ray.shutdown)
        return self

    def __exit__(self, *exc: object) -> None:
        self._leaving.close()

    def nodes(self) -> list[Node]:
        """The machines that are alive and have CPUs to give, in an order of their own that stays."""
        found = []
        for each in self._ray.nodes():
            resources = each.get("Resources", {})
            if each["Alive"] and resources.get("CPU", 0) >= 1:
                found.append(Node(each["NodeID"], each["NodeManagerAddress"], int(resources["CPU"]), int(resources.get("GPU", 0))))
        return sorted(found, key=lambda node: (node.address, node.id))

    def start(self, kind: str, node: Node, threads: int, cpus: float, gpus: int) -> Any:
        """A worker for jobs of `kind` on `node`, which takes so many of its CPUs and GPUs once they are free."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._ray.remote(Host).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_concurrency=2,  # a call, and a question for its state
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        return actor.remote(kind, threads)

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        """A call of a method of Host that is under way."""
        return getattr(worker, method).remote(*arguments)

    def share(self, value: Any) -> Any:
        """A reference to a value that calls may have as an argument, which reaches each machine once."""
        return self._ray.put(value)

    def wait(self, calls: Sequence[Any], seconds: float) -> list[Any]:
        """The calls that have ended, once there are any, or after so many seconds."""
        if not calls:
            time.sleep(seconds)
            return []
        return self._ray.wait(list(calls), num_returns=1, timeout=seconds)[0] and self._ended(calls)

    def _ended(self, calls: Sequence[Any]) -> list[Any]:
        return self._ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]

    def result(self, call: Any) -> Any:
        """What a call that has ended returned. Raises Died, and what it raised."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(call)
        except errors.RayTaskError as e:
            if isinstance(e, errors.RayActorError):
                raise Died(first_line(e)) from e
            raise e.as_instanceof_cause() from None
        except (errors.RayActorError, errors.RaySystemError, errors.ObjectLostError) as e:
            raise Died(_why(str(e))) from e

    def stop(self, worker: Any) -> None:
        """Ends a worker at once."""
        self._ray.kill(worker)


def _check_listens(address: str) -> None:
    """Raises UsageError for what is no HOST:PORT, ClusterError where nothing listens. Ray would try for a minute."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise UsageError(
            f"--cluster is {address!r}", "Give auto, local, or the HOST:PORT of the head node, whose port is mostly 6379."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS).close()
    except (OSError, OverflowError) as e:
        raise ClusterError(f"nothing listens at {address}: {first_line(e)}", "Start it with `ray start --head`.") from e


def _own_address(address: str) -> dict[str, str]:
    """On loopback Ray would take an outward address of this machine, where a cluster on loopback is not heard."""
    host = address.rpartition(":")[0]
    return {"_node_ip_address": host} if host.startswith("127.") else {}


def _unreachable(address: str, error: Exception) -> ClusterError:
    if "Version mismatch" in str(error):
        return ClusterError(f"the cluster at {address} runs other versions: {' '.join(str(error).split())}", "Install the same.")
    if address == AUTO:
        return ClusterError("no Ray cluster runs on this machine", "Start one with `ray start --head`, or use --cluster local.")
    return ClusterError(f"the Ray cluster at {address} does not answer: {first_line(error)}", "Look at it with `ray status`.")


def _why(text: str) -> str:
    """The reason in a message of Ray, in one sentence."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if "creation task" in text:  # a traceback, with the error at its end
        return lines[-1]
    for line in lines:
        for mark in ("Worker exit detail:", "The actor is dead because"):
            if mark in line:
                return line.partition(mark)[2].strip().split(". ")[0]
    return next(iter(lines), "no reason is known")
