"""A measurement is pinned to its CPUs and restores the affinity of the process."""

import os
import threading

import pytest

from clipress.bench.cpu_pinning import THREADS, pinned
from clipress.errors import RecipeError

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot pin")


@pytest.fixture
def allowed(monkeypatch):
    """A machine with CPUs 2 to 5; return the current affinity."""
    now = [{2, 3, 4, 5}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: now[0])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: now.__setitem__(0, set(cpus)))
    return now


@pytest.mark.parametrize(
    "cpus, threads, expected", [(None, 1, [5]), (None, 9, [2, 3, 4, 5]), ((3, 2), 1, [2, 3]), ((), 1, [2, 3, 4, 5])]
)
def test_a_measurement_is_pinned_to_one_cpu_per_thread_or_to_the_named_cpus(allowed, cpus, threads, expected):
    with pinned(cpus, threads) as found:
        assert found == expected and allowed[0] == set(expected)
    assert allowed[0] == {2, 3, 4, 5}


def test_pinning_is_undone_after_an_error(allowed):
    with pytest.raises(KeyError), pinned(None, 1):
        raise KeyError
    assert allowed[0] == {2, 3, 4, 5}


def test_a_cpu_that_is_not_allowed_is_named(allowed):
    with (
        pytest.raises(RecipeError, match=r"this process may use \(2, 3, 4, 5\), found CPU 0, 9"),
        pinned((0, 2, 9), 1),
    ):
        pass


def test_pinning_is_skipped_silently_where_unsupported(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity")
    with pinned(None, 1) as found:
        assert found is None


@pytest.mark.skipif(not THREADS.is_dir(), reason="only Linux lists the threads of a process")
def test_threads_that_already_run_are_pinned_too_and_restored():
    allowed, done = os.sched_getaffinity(0), threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with pinned(None, 1) as cpus:
            assert os.sched_getaffinity(thread.native_id) == set(cpus) and len(cpus) == 1
        assert os.sched_getaffinity(thread.native_id) == allowed
    finally:
        done.set()
        thread.join()
