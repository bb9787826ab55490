"""What a person sees while a run goes on: a line per step, and a bar for what takes long.

On a terminal a step shows a spinner with its seconds and a bar moves; in a log each step is one line when it is done.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says what is being done and, when it is done, how long it took."""
    start = time.monotonic()
    with out.status(what):
        yield
    out.print(f"{what} [dim]({time.monotonic() - start:.1f} s)[/dim]")


@contextmanager
def progress(what: str, total: int) -> Iterator[callable]:
    """A bar over `total` answers; yields the function that moves it by one. In a log it shows nothing."""
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
