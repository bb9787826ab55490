"""Calls functions in a child process with bounds of time and memory."""

import atexit
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any


class CallFailed(Exception):
    """A confined call gave no answer. The message is the end of a sentence that starts with a name."""


class Confined:
    """Calls functions in a child process. The system ends each call that takes too much time or memory.

    A stranger's template or pattern can loop forever, or request all memory, inside C code that no thread can
    interrupt. A call may take `seconds` of processor time. Processor time is counted so that a busy machine changes no
    answer. A call may also take `room` bytes of address space beyond the memory that the idle child has. The child
    starts with the first call. After an ended call, the next call starts another child. The child ends when this
    process ends, even if this process is killed.

    `program` is Python source that defines FUNCTIONS. FUNCTIONS has, for each name, a function and the arguments of a
    first call. The first call has no bounds, because the function's imports happen in it. Arguments and answers are
    plain data.

    On Windows there are no bounds. Systems without /proc bound the processor time, but not the memory.
    """

    def __init__(self, program: str, seconds: float, room: int):
        self._program = f"{program}\n{inspect.getsource(_answer_calls)}\n_answer_calls(FUNCTIONS, {seconds}, {room})\n"
        self._seconds, self._room = seconds, room
        self._lock, self._closed = threading.Lock(), False
        self._child: Any = None  # a subprocess.Popen with two pipes
        atexit.register(self._close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._leave)

    def call(self, name: str, *arguments):
        """The answer of the function `name`.

        Raises:
            CallFailed: the call exceeded a bound, the function raised an exception, or the child process ended or can't
                start.
        """
        line = json.dumps([name, arguments]).encode() + b"\n"
        with self._lock:
            while True:
                first, self._child = self._child is None, self._child or self._started()
                try:
                    said = self._exchanged(line)
                except BaseException:  # a signal: the next call would get this call's answer
                    self._end()
                    raise
                if "answer" in said:
                    return said["answer"]
                if "failed" in said:
                    raise CallFailed(f"failed: {said['failed']}")
                code = self._end(wait=not said)
                late = code == -getattr(signal, "SIGPROF", 256)
                if first or late:  # else earlier calls may be the cause: try a new child
                    raise CallFailed(self._reason(said, code, late))

    def _reason(self, said: dict, code: int, late: bool) -> str:
        if late:
            return f"took more than {self._seconds:g} s of processor time"
        if said:
            return f"took more than {self._room // 2**20} MiB of memory"
        with suppress(ValueError):
            return f"ended its process with {signal.Signals(-code).name}"
        return f"ended its process with exit code {code}"

    def _started(self) -> subprocess.Popen:
        if self._closed:
            raise CallFailed("was called while the process ends")
        if not sys.executable:
            raise CallFailed("can't run: sys.executable is empty, so no Python can be started")
        path = [str(Path(entry).absolute()) for entry in sys.path if isinstance(entry, str)]
        command = [sys.executable, "-I", "-c", f"import sys\nsys.path[:] = {path!r}\n{self._program}"]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,  # a forked process must not inherit a half-written line
            start_new_session=True,  # a terminal's Ctrl-C doesn't reach the child
        )

    def _exchanged(self, line: bytes) -> dict:
        """The child's reply to a line. The reply is {} if the child ends instead."""
        with suppress(BrokenPipeError):
            left = memoryview(line)
            while left:
                left = left[self._child.stdin.write(left) :]
        parts: list[bytes] = []
        while not parts or not parts[-1].endswith(b"\n"):
            parts.append(self._child.stdout.read(2**20))
            if not parts[-1]:
                return {}
        return json.loads(b"".join(parts))

    def _end(self, wait: bool = False) -> int:
        """Ends the child, and gives its exit code. With `wait`, the child ends by itself."""
        child, self._child = self._child, None
        if child is None:
            return 0
        if not wait:
            child.kill()
        code = child.wait()
        child.stdin.close()
        child.stdout.close()
        return code

    def _close(self) -> None:
        """Ends the child at the end of this process. Other threads may be in a call at that time."""
        self._closed = True
        self._end()

    def _leave(self) -> None:
        """Runs after a fork. The child belongs to the parent process, and another thread may hold the lock."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            child.returncode = 0  # the parent process waits for the child
            child.stdin.close()
            child.stdout.close()


def _answer_calls(functions: dict, seconds: float, room: int) -> None:
    """The loop of a confined process. Answers calls, one JSON line each, until the input ends.

    The process gets only the source of this function. So the function imports the modules that it uses.
    """
    import json
    import os
    import signal
    from pathlib import Path

    try:
        import resource
    except ImportError:  # Windows
        resource = None  # type: ignore[assignment]

    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)  # a library's prints must not look like an answer

    def bound_memory(more: int | None) -> None:
        sizes = Path("/proc/self/statm")  # proc(5)
        if resource is None or not sizes.exists():
            return
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = hard if more is None else int(sizes.read_text().split()[0]) * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))

    def bound_time(limit: float) -> None:
        if resource is not None:
            signal.setitimer(signal.ITIMER_PROF, limit)

    if resource is not None:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # the signal ends this process at any point
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash writes no core file
    called = set()
    for line in calls:
        name, arguments = json.loads(line)
        try:
            function, example = functions[name]
            if name not in called:
                bound_memory(None)
                function(*example)
                called.add(name)
                bound_memory(room)
            bound_time(seconds)
            said = json.dumps({"answer": function(*arguments)})
        except MemoryError:
            bound_memory(None)
            said = '{"memory": true}'
        except Exception as error:
            said = json.dumps({"failed": f"{type(error).__name__}: {' '.join(str(error).split()):.300}"})
        bound_time(0)
        try:
            answers.write(said.encode() + b"\n")
            answers.flush()
        except BrokenPipeError:
            os._exit(0)
