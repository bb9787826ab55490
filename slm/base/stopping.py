"""What asks a run to end from outside: a signal, the end of the `mlflow run` that started it, and its timeout.

Each raises Stopped in the main thread, once; what comes after it is ignored, so that the run can be ended in peace.
Where the main thread doesn't get there (a model that hangs in native code), a thread says the last words and ends the
process after GRACE seconds. Only Linux tells when another process ends; elsewhere the parent is looked for.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from select import select

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHELLS = ("bash", "sh", "dash")  # that `mlflow run` starts an entry point through
GRACE = 20.0  # seconds

_asked_by: list[str] = []  # why this process sent itself a signal


class Stopped(BaseException):
    """The run is asked to end. No `except Exception` may take it for a row's failure."""

    def __init__(self, number: int, reason: str = ""):
        super().__init__(reason or signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def listening(last_words: Callable[[str], None]) -> Iterator[None]:
    """From here on signals raise Stopped; so does the end of `mlflow run`, where that started this process.

    `last_words` is called from another thread, with the reason, where the main thread hasn't ended the process in time.
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


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Stopped in the block once the seconds are over; 0 is no limit."""
    timer = threading.Timer(seconds, _ask, (f"timeout={seconds:g}",))
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _stop(number, frame):
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
        if not said:  # nobody listens any more
            os.close(wake)
            return
        number = said[0]
    time.sleep(GRACE)
    with suppress(Exception):
        last_words(_asked_by[0] if _asked_by else signal.Signals(number).name)
    os._exit(128 + number)


def _launcher() -> int:
    """The process that started this one, past its shells."""
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
