"""Stops a run for one of three reasons: a signal, the end of the `mlflow run` that started it, or its timeout.

The first reason raises Stopped in the main thread. Later ones are ignored, so that the run can end undisturbed.
The main thread may hang, for example in a model's native code. Then, after GRACE seconds, another thread calls
`last_words` and ends the process. Linux reports the end of another process. Other systems do not, so there this module
checks the parent process every second.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELLS = ("bash", "sh", "dash")  # `mlflow run` starts an entry point through a shell
GRACE = 20.0  # seconds, and those that `allow` adds

_allowed = [0.0]
_asked_by: list[str] = []  # why this process sent itself a signal


class Stopped(BaseException):
    """The run must end. This is no Exception, so no `except Exception` can count it as a row's failure."""

    def __init__(self, number: int, reason: str = ""):
        super().__init__(reason or signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def listening(last_words: Callable[[str], None]) -> Iterator[None]:
    """In the block, signals raise Stopped. If `mlflow run` started this process, its end raises Stopped too.

    If the main thread does not end the process in time, another thread calls `last_words` with the reason.
    """
    for number in SIGNALS:
        signal.signal(number, _stop)
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    threading.Thread(target=_insist, args=(wake, last_words), name="insist", daemon=True).start()
    if "MLFLOW_RUN_ID" in os.environ:
        threading.Thread(target=_follow, args=(_launcher(),), name="follow", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        os.close(woken)


def allow(seconds: float) -> None:
    """Lets the main thread take so much longer to end the process."""
    _allowed[0] = seconds


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Stopped in the block after `seconds`. 0 means no limit."""
    timer = threading.Timer(seconds, _ask, (f"timeout={seconds:g}",))
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _stop(number: int, frame: object) -> NoReturn:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number, _asked_by[0] if _asked_by else "")


def _ask(reason: str) -> None:
    _asked_by.append(reason)
    os.kill(os.getpid(), signal.SIGTERM)


def _insist(wake: int, last_words: Callable[[str], None]) -> None:
    number = 0
    while number not in SIGNALS:
        said = os.read(wake, 1)
        if not said:  # the `listening` block has ended
            os.close(wake)
            return
        number = said[0]
    time.sleep(GRACE + _allowed[0])
    with suppress(Exception):
        last_words(_asked_by[0] if _asked_by else signal.Signals(number).name)
    os._exit(128 + number)


def _launcher() -> int:
    """The PID of the process that started this process. Shells between the two are skipped."""
    pid = os.getppid()
    with suppress(OSError, ValueError):
        while Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip() in SHELLS:
            pid = int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
    return pid


def _follow(pid: int) -> None:
    try:
        select([os.pidfd_open(pid)], [], [])
    except (AttributeError, OSError):
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(1)
    _ask("the end of mlflow run")
