"""A few threads that take tasks in the order in which they come, with a bounded number waiting."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Pipeline:
    """Use as a context manager. After a task has failed, those behind it are skipped, and the failure is raised from the
    next `submit` or `drain`: of several the one that was submitted first."""

    def __init__(self, threads: int):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="qcli")
        self._room = threading.Semaphore(2 * threads)
        self._lock = threading.Lock()
        self._running: set[Future[None]] = set()
        self._failures: dict[int, BaseException] = {}
        self._submitted = 0

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            return
        try:
            self.drain()
        finally:
            self._pool.shutdown(wait=True)

    def submit(self, task: Callable[[], None]) -> None:
        """Queues a task; waits while as many are queued as two for each thread. Raises what an earlier task raised."""
        self._room.acquire()
        self._raise()
        number = self._submitted = self._submitted + 1
        future = self._pool.submit(self._run, number, task)
        with self._lock:
            self._running.add(future)
        future.add_done_callback(self._finished)

    def drain(self) -> None:
        """Waits until every task has run. Raises what one of them raised."""
        with self._lock:
            running = set(self._running)
        wait(running)
        self._raise()

    def _run(self, number: int, task: Callable[[], None]) -> None:
        if self._failures and min(self._failures) < number:
            return
        try:
            task()
        except BaseException as e:
            with self._lock:
                self._failures[number] = e

    def _finished(self, future: Future[None]) -> None:
        with self._lock:
            self._running.discard(future)
        self._room.release()

    def _raise(self) -> None:
        if self._failures:
            with self._lock:
                running = set(self._running)
            wait(running)  # one submitted earlier may yet fail
            raise self._failures[min(self._failures)]
