"""Starts entry points in forks of one process that has imported MLflow already.

Importing MLflow takes a core for three seconds, a fork takes milliseconds. What runs is a process of its own, with its
own environment, working folder, output and exit code, as `python -m` makes one; only imported modules are shared, and
none of the project's. A test about imports, or about the start itself, takes `commands.call`.
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

# what entry points import, but for torch and onnxruntime, whose threads don't survive a fork
PRELOADED = ("mlflow", "mlflow.pyfunc", "mlflow.models", "mlflow.store.tracking.sqlalchemy_store", "pandas")
PRELOADED += ("mlflow.store.model_registry.sqlalchemy_store", "alembic.command", "scipy.stats", "rich.console")
PRELOADED += ("matplotlib.figure", "jinja2", "openai", "mlflow.genai")
_servers: dict[int, str] = {}  # this process's server, by this process


def run(command: list[str], cwd: Path, environment: dict[str, str], timeout: float) -> tuple[int, str, str]:
    """What `python -m` does with `command`: its exit code, and its stdout and stderr.

    Raises subprocess.TimeoutExpired after `timeout` seconds, and kills the process then.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, socket.socket(socket.AF_UNIX) as asked:
        asked.connect(_server())
        cores = sorted(os.sched_getaffinity(0))
        words = {"command": command, "cwd": str(cwd), "environment": environment, "cores": cores}
        socket.send_fds(asked, [json.dumps(words).encode() + b"\n"], [out.fileno(), err.fileno()])
        asked.settimeout(timeout)
        answers = asked.makefile()
        pid = int(answers.readline())
        try:
            status = int(answers.readline())
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(command, timeout) from None
        out.seek(0)
        err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode()


def _server() -> str:
    """The socket of this process's server. It is started at the first call, and ends with this process."""
    if os.getpid() not in _servers:
        path = Path(tempfile.mkdtemp(prefix="starts-"), "socket")
        process = subprocess.Popen([sys.executable, __file__, str(path)], stdin=subprocess.PIPE, start_new_session=True)
        while not path.exists():
            assert process.poll() is None, "the server of warm starts has ended"
            time.sleep(0.05)
        _servers[os.getpid()] = str(path)
    return _servers[os.getpid()]


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


def _main() -> None:
    sys.path.pop(0)  # this file's folder
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # with several cores, numpy starts threads
    for name in PRELOADED:
        importlib.import_module(name)
    # a lock that another thread held would stay locked in every fork; jemalloc, pyarrow's allocator, sees to its own
    threads = sorted(Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    assert threading.active_count() == 1 and len(set(threads) - {"jemalloc_bg_thd"}) == 1, threads
    gc.freeze()
    words, files = _asked(sys.argv[1])
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
        os.close(file)
    os.sched_setaffinity(0, words["cores"])
    os.environ.clear()
    os.environ.update(words["environment"])
    os.chdir(words["cwd"])
    sys.path.insert(0, words["cwd"])
    sys.argv = words["command"]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
