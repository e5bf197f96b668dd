"""Results come in order, a bounded number is computed ahead, and errors reach the consumer."""

import threading
from itertools import count, islice

import pytest

from clipress.data.prefetch import map_ahead, prefetched


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("ahead", [0, 1, 7, 100])
def test_results_match_map(threads, ahead):
    assert list(map_ahead(lambda x: x * x, range(50), threads, ahead)) == [x * x for x in range(50)]


def test_read_ahead_is_bounded():
    taken = []
    results = map_ahead(lambda x: x, map(lambda x: taken.append(x) or x, count()), threads=2, ahead=5)
    assert list(islice(results, 3)) == [0, 1, 2]
    assert len(taken) <= 3 + 5
    results.close()


def test_an_error_is_raised_where_its_result_is_due():
    results = map_ahead(lambda x: 1 // x, [2, 1, 0, 1], threads=2, ahead=3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("items", [0, 1, 3, 20])
def test_prefetched_items_are_unchanged_and_come_from_one_other_thread(items):
    threads = set()

    def produce():
        for item in range(items):
            threads.add(threading.current_thread())
            yield item

    assert list(prefetched(produce())) == list(range(items))
    assert len(threads) <= 1 and threading.current_thread() not in threads


def test_a_producer_error_is_raised_after_the_earlier_items():
    def produce():
        yield 1
        raise ValueError("no more")

    items = prefetched(produce())
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)
