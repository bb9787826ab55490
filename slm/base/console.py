"""Shows the progress of a run: one line for each step, and a bar for long work.

On a terminal, a step shows a spinner until it ends, and the bar moves. In a log, each finished step is one line, and
long work says every LINE_SECONDS how far it is.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
LINE_SECONDS = 15.0  # between two lines in a log


@contextmanager
def step(what: str) -> Iterator[Callable[[float], None]]:
    """Shows the step's name, and after the step its duration in seconds.

    Yields a function that may be called with the share of the step that is done, from 0 to 1. The time that is left
    is then shown.
    """
    start, done = time.monotonic(), 0.0

    def line() -> str:
        seconds = time.monotonic() - start
        if not done:
            return f"{what}: {seconds:.0f} s so far"
        return f"{what}: {done:.0%}, about {duration(seconds / done * (1 - done))} left"

    with out.status(what) as status, _told_in_logs(line):

        def tell(share: float) -> None:
            nonlocal done
            done = share
            status.update(line())

        yield tell
    out.print(f"{what} [dim]({time.monotonic() - start:.1f} s)[/dim]")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how many of `total` answers there are. Yields the function to call for each: it takes the answer's tokens.

    Tokens are of answers that were generated now; an answer of an earlier run has 0.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    start, rows, tokens = time.monotonic(), 0, 0

    def speed() -> str:
        return f"{tokens / (time.monotonic() - start):.0f} tokens/s" if tokens else ""

    def line() -> str:
        left = (time.monotonic() - start) / rows * (total - rows) if rows else 0.0
        parts = [f"{rows:,} of {total:,} rows", speed(), f"about {duration(left)} left" if rows else ""]
        return f"{what}: {', '.join(filter(None, parts))}"

    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar, _told_in_logs(line):
        task = bar.add_task(what, total=total, speed="")

        def advance(more: int) -> None:
            nonlocal rows, tokens
            rows, tokens = rows + 1, tokens + more
            bar.update(task, advance=1, speed=speed())

        yield advance


@contextmanager
def _told_in_logs(line: Callable[[], str]) -> Iterator[None]:
    """Prints `line()` every LINE_SECONDS while the block lasts, unless a terminal shows a bar or a spinner."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(LINE_SECONDS):
            out.print(line(), markup=False)

    if out.is_terminal:
        yield
        return
    thread = threading.Thread(target=tell, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """`40 s`, `12 min` or `2.5 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
