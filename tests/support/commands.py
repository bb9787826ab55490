"""Commands, servers and ports: what the tests start on this machine."""

import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
from support import warm_starts

REPOSITORY = Path(__file__).resolve().parents[2]
without_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="a GPU is at hand")
# uv doesn't read pip's settings; a folder of wheels that pip is given is passed on, so that both get the same torch
LINKS = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if os.environ.get("PIP_FIND_LINKS") else {}


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_environment(changes: dict[str, str]) -> dict[str, str]:
    """The variables of this process, with this environment's programs first on PATH, and with `changes`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path} | changes


def call(*command, cwd=REPOSITORY, timeout=600, **environment) -> Finished:
    """Runs a command with this environment's programs first on PATH."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=in_environment(environment), capture_output=True, text=True, timeout=timeout
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def python_with(name: str, *packages: str) -> Path:
    """A Python with packages whose pins don't go with ours, in an environment of its own in the cache folder.

    `packages` are what pip installs. `name` changes with them. The environment is made once.
    """
    from slm.base import cache

    folder = cache.root() / f"tests-{name}"
    python, done = folder / "bin" / "python", folder / "done"
    if not done.exists():
        uv = (sys.executable, "-m", "uv")
        for command in (
            (*uv, "venv", "-q", "--clear", "--python", sys.executable, folder),
            (*uv, "pip", "install", "-q", "--python", python, *packages),
        ):
            made = call(*command, **LINKS)
            assert made.code == 0, made.err
        done.touch()
    return python


def started(name: str, *options: str, cwd=REPOSITORY, merged=False, **environment) -> warm_starts.Process:
    """`python -m entrypoints.name`, going on in a process of its own that finds MLflow imported."""
    return warm_starts.Process([f"entrypoints.{name}", *map(str, options)], cwd, in_environment(environment), merged)


def entry_point(name: str, *options: str, timeout=600, **environment) -> Finished:
    """The same, to its end."""
    return ended(started(name, *options, **environment), timeout)


def mlflow_command(*words, cwd: Path, timeout=600, **environment) -> Finished:
    """MLflow's own command line, in a process that finds MLflow imported. What that starts, finds nothing imported."""
    return ended(warm_starts.Process(["mlflow", *map(str, words)], cwd, in_environment(environment)), timeout)


def ended(process: warm_starts.Process, timeout: float) -> Finished:
    try:
        out, err = process.communicate(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Finished(process.wait(), out, err)


@contextmanager
def store(environment: dict[str, str]):
    """MLflow's tracking URI as the environment has it, and afterwards as it was."""
    utils = importlib.import_module("mlflow.tracking._tracking_service.utils") if "mlflow" in sys.modules else None
    before = utils and utils._tracking_uri
    if utils:
        utils._tracking_uri = environment.get("MLFLOW_TRACKING_URI")
    yield
    if utils or "mlflow" in sys.modules:
        importlib.import_module("mlflow.tracking._tracking_service.utils")._tracking_uri = before


def in_process(name: str, *options: str, **environment: str) -> Finished:
    """An entry point in this process, for what it refuses. A process of its own takes seconds to start."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    out, err = io.StringIO(), io.StringIO()
    try:
        with mock.patch.dict(os.environ, environment), store(environment), redirect_stdout(out), redirect_stderr(err):
            code = importlib.import_module(f"entrypoints.{name}").main([*options])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Finished(code, out.getvalue(), err.getvalue())


@contextmanager
def running(command: list[str], health: str, cwd: Path = REPOSITORY, output=None, end: int = 15, **environment):
    """A server process, in a group of its own, from the moment it answers at `health`; the signal `end` stops it."""
    process = subprocess.Popen(
        command, cwd=cwd, env=in_environment(environment), stdout=output, stderr=output, start_new_session=True
    )
    with healthy(process, health, end):
        yield process


@contextmanager
def running_warm(module: list[str], health: str, cwd: Path = REPOSITORY, output=None, end: int = 15, **environment):
    """The same, of what `python -m` runs, in a process that finds MLflow imported."""
    process = warm_starts.Process(module, cwd, in_environment(environment), merged=True, output=output)
    with healthy(process, health, end):
        yield process


@contextmanager
def healthy(process, health: str, end: int):
    """Waits until a server answers, and stops it at the end."""
    try:
        for _ in range(600):
            with suppress(OSError):
                urllib.request.urlopen(health, timeout=1).close()
                break
            assert process.poll() is None, f"{process.args} ended with {process.poll()}"
            time.sleep(0.2)
        else:
            raise AssertionError(f"{health} didn't answer within two minutes")
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        process.wait(30)


@contextmanager
def serving(folder: Path, *options: str, port: int = 0, end: int = 15, **environment):
    """A `mlflow server` on loopback, with its log and what it stores in `folder`; gives its URI, and stops it."""
    port = port or free_port()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its workers would take the cores
    uri = f"http://127.0.0.1:{port}"
    with (
        (folder / "log").open("w") as log,
        running_warm([*command, *options], f"{uri}/health", cwd=folder, output=log, end=end, **environment),
    ):
        yield uri
