"""Starts programs in forks of a process that has imported what they need: MLflow, or torch and transformers.

Importing MLflow takes a core for three seconds, torch and transformers four. A fork takes milliseconds. What runs is a
process of its own, with its own environment, working folder, output and exit code, as `python -m` makes one; only
imported modules are shared, and none of the project's. A test about imports, or about the start itself, takes
`commands.call`.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

ENTRY_POINTS = (
    *("mlflow", "mlflow.pyfunc", "mlflow.models", "mlflow.store.tracking.sqlalchemy_store", "pandas"),
    *("mlflow.store.model_registry.sqlalchemy_store", "alembic.command", "scipy.stats", "rich.console"),
    *("matplotlib.figure", "jinja2", "openai", "mlflow.genai"),
)
# What onnxruntime-genai's builder imports, without onnxruntime and onnxruntime_genai: their threads don't survive a
# fork. `transformers` alone imports almost nothing; the builder asks it for Gemma 3, and that takes most of the time
EXPORTS = (
    *("torch", "transformers", "transformers.models.gemma3.modeling_gemma3", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.generation", "onnx", "onnx_ir", "sympy"),
)
SCRATCH = tempfile.gettempdir()  # a test may set another one for a while
_servers: dict[tuple[int, tuple[str, ...]], str] = {}  # by the process that started one, and what it has imported


class Process:
    """What `python -m` does with `command`, going on. It has what the tests need of subprocess.Popen."""

    def __init__(
        self,
        command: list[str],
        cwd: Path,
        environment: dict[str, str],
        merged: bool = False,
        imported=ENTRY_POINTS,
        output=None,
    ):
        """With `merged`, stdout holds stderr too. With `output`, that file gets both."""
        self.args, self.returncode = command, None
        self._out = output or tempfile.TemporaryFile()  # noqa: SIM115 - read when the process has ended
        self._err = self._out if merged or output else tempfile.TemporaryFile()  # noqa: SIM115
        cores = sorted(os.sched_getaffinity(0))
        words = {"command": [*map(str, command)], "cwd": str(cwd), "environment": environment, "cores": cores}
        self._asked = socket.socket(socket.AF_UNIX)
        self._asked.connect(_server(imported))
        files = [self._out.fileno(), self._err.fileno()]
        socket.send_fds(self._asked, [json.dumps(words).encode() + b"\n"], files)
        self._answers = self._asked.makefile()
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        return (
            self.wait(0) if self.returncode is None and select.select([self._asked], [], [], 0)[0] else self.returncode
        )

    def wait(self, timeout: float = 600) -> int:
        """The exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._asked], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = os.waitstatus_to_exitcode(int(self._answers.readline()))
            self._asked.close()
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it wrote to stdout and stderr, when it has ended."""
        self.wait(timeout)
        return _content(self._out), "" if self._err is self._out else _content(self._err)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _content(file) -> str:
    file.seek(0)
    return file.read().decode()


def _server(imported: tuple[str, ...]) -> str:
    """The socket of this process's server. It is started at the first call, and ends with this process."""
    key = os.getpid(), imported
    if key not in _servers:
        path = Path(tempfile.mkdtemp(prefix="starts-", dir=SCRATCH), "socket")
        process = subprocess.Popen(
            [sys.executable, __file__, str(path), *imported], stdin=subprocess.PIPE, start_new_session=True
        )
        while not path.exists():
            assert process.poll() is None, "the server of warm starts has ended"
            time.sleep(0.05)
        _servers[key] = str(path)
    return _servers[key]


def _asked(path: str) -> tuple[dict, list[int]]:
    """Answers each connection with two forks: one returns, to run the command; the other one tells how that ended."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        Path(f"{path}.new").rename(path)
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os._exit(0)  # whoever started this has ended
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                with suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                continue
            words, files = b"", []
            while not words.endswith(b"\n"):
                part, more, _, _ = socket.recv_fds(connection, 1 << 20, 2)
                words, files = words + part, files + more
            runner = os.fork()
            if runner:
                connection.sendall(f"{runner}\n".encode())
                connection.sendall(f"{os.waitpid(runner, 0)[1]}\n".encode())
                os._exit(0)
            connection.close()
            return json.loads(words), files


def _serves_here(command: list[str], extra_env: dict[str, str], **_) -> None:
    """Runs uvicorn in this process. `mlflow server` starts it in a new one, which imports MLflow for three seconds."""
    os.environ.update(extra_env)
    sys.argv = command[2:]  # without `python -m`
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def _main() -> None:
    sys.path.pop(0)  # this file's folder
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # with several cores, numpy starts threads
    for name in sys.argv[2:]:
        importlib.import_module(name)
    # a lock that another thread held would stay locked in every fork; jemalloc, pyarrow's allocator, sees to its own
    threads = sorted(Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    assert threading.active_count() == 1 and len(set(threads) - {"jemalloc_bg_thd"}) == 1, threads
    gc.freeze()
    words, files = _asked(sys.argv[1])
    os.setsid()  # its group has its own children alone, so that a signal can be sent to all of them
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
        os.close(file)
    os.sched_setaffinity(0, words["cores"])
    os.environ.clear()
    os.environ.update(words["environment"])
    os.chdir(words["cwd"])
    sys.path.insert(0, words["cwd"])
    sys.argv = words["command"]
    if sys.argv[:2] == ["mlflow", "server"]:
        importlib.import_module("mlflow.server")._exec_cmd = _serves_here
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
