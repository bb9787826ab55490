"""Shows the progress of a run: one line for each step, and a bar for long work.

On a terminal, a step shows a spinner until it ends, and the bar moves. In a log, each finished step is one line.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Shows the step's name, and after the step its duration in seconds."""
    start = time.monotonic()
    with out.status(what):
        yield
    out.print(f"{what} [dim]({time.monotonic() - start:.1f} s)[/dim]")


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar over `total` answers. Yields the function that moves the bar by one. A log gets no bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
