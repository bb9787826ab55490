"""Runs calls in several threads at a time, with a time limit for each call.

A thread can't be stopped from outside. If a call takes too long, its thread goes on, and its result is not used. The
threads end with the process.
"""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any


class TookTooLong(Exception):
    """No result came within the time limit."""

    def __init__(self, seconds: float):
        super().__init__(f"no answer within {seconds:g} s (row_timeout)")


def answered(function: Callable, items: list, threads: int, seconds: float = 0.0) -> Iterator[tuple[int, Any]]:
    """Yields (place, function(item)) as they come, `threads` at a time.

    If a call takes longer than `seconds` (0: no limit), its result is a TookTooLong, and a new thread replaces its
    thread. `function` must not raise an error.
    """
    waiting: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for place, item in enumerate(items):
        waiting.put((place, item))
    begun: dict[int, float] = {}  # place -> start in seconds; the thread that removes a place yields its result
    owned = threading.Lock()

    def taken(place: int) -> bool:
        with owned:
            return begun.pop(place, None) is not None

    def work():
        with suppress(queue.Empty):
            while True:
                place, item = waiting.get_nowait()
                begun[place] = time.monotonic()
                result = function(item)
                if not taken(place):  # the call took too long, and a new thread has replaced this thread
                    return
                done.put((place, result))

    def begin():
        threading.Thread(target=work, daemon=True).start()

    for _ in range(min(threads, len(items))):
        begin()
    left = len(items)
    try:
        while left:
            since = min(list(begun.values()), default=time.monotonic())
            try:
                yield done.get(timeout=max(since + seconds - time.monotonic(), 0.001) if seconds else None)
                left -= 1
            except queue.Empty:
                for place, since in list(begun.items()):
                    if time.monotonic() - since >= seconds and taken(place):
                        begin()
                        yield place, TookTooLong(seconds)
                        left -= 1
    finally:
        with suppress(queue.Empty):  # no further call starts
            while True:
                waiting.get_nowait()


def drawn(source: Iterable, seconds: float) -> Iterator:
    """Yields the items of `source`, which runs in its own thread. An error of `source` is raised here.

    Raises:
        TookTooLong: no item came within `seconds`.
    """
    done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    end, left_alone = object(), threading.Event()

    def work():
        try:
            for item in source:
                done.put((item, None))
                if left_alone.is_set():
                    return
            done.put((end, None))
        except BaseException as error:
            done.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                item, error = done.get(timeout=seconds)
            except queue.Empty:
                raise TookTooLong(seconds) from None
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        left_alone.set()
