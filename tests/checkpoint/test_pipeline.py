import threading
import time

import pytest

from qcli.quantization.pipeline import Pipeline


def test_every_task_runs_and_several_at_once():
    done, together = [], threading.Barrier(3, timeout=20)
    with Pipeline(3) as pipeline:
        for _ in range(3):
            pipeline.submit(together.wait)
        for i in range(50):
            pipeline.submit(lambda i=i: done.append(i))
        pipeline.drain()
        assert sorted(done) == list(range(50))


def test_few_wait():
    """A task that does not end holds the submitter back: what waits is bounded, and so is its memory."""
    gate, submitted = threading.Event(), []

    def fill(pipeline):
        for i in range(20):
            pipeline.submit(gate.wait)
            submitted.append(i)

    with Pipeline(2) as pipeline:
        filler = threading.Thread(target=fill, args=(pipeline,))
        filler.start()
        time.sleep(0.2)
        assert len(submitted) == 4
        gate.set()
        filler.join()
    assert len(submitted) == 20


def test_the_first_submitted_failure_is_raised():
    late = threading.Event()

    def first():
        late.wait(20)
        raise ValueError("first")

    def second():
        late.set()
        raise KeyError("second")

    with pytest.raises(ValueError, match="first"), Pipeline(2) as pipeline:
        pipeline.submit(first)
        pipeline.submit(second)
        pipeline.drain()


def test_after_a_failure_nothing_else_runs():
    ran = []

    def fail():
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"), Pipeline(1) as pipeline:
        pipeline.submit(fail)
        for i in range(100):
            pipeline.submit(lambda i=i: ran.append(i))
    assert ran == []


def test_an_interrupt_of_the_submitter_ends_the_threads():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), Pipeline(2) as pipeline:
        pipeline.submit(lambda: time.sleep(0.1))
        raise KeyboardInterrupt
    assert threading.active_count() == before
