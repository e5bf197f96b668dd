"""Compute ahead of the consumer on threads, and hand results over in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import repeat
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
_END = object()


def map_ahead(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """Yield `function(item)` for every item, in order, while threads compute up to `ahead` results in advance.

    Decoding an image releases the interpreter lock, so threads do run in parallel there. With 0, ThreadPoolExecutor chooses
    the number of threads: four more than there are cores, at most 32.
    """
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads or None, "ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the consumer may stop early, or a result may raise
            for future in waiting:
                future.cancel()


def prefetched(items: Iterable[T], ahead: int = 4) -> Iterator[T]:
    """Yield items in order while one thread fetches the next ones."""
    iterator = iter(items)
    with closing(map_ahead(lambda _: next(iterator, _END), repeat(None), threads=1, ahead=ahead)) as fetched:
        for item in fetched:
            if item is _END:
                return
            yield item
