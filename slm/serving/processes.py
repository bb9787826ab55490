"""Several processes of `serve` behind one port: starts them, replaces those that end, and moves all of them.

This process holds the port, the MLflow run and the alias. It answers no request and loads no model. Each process
(slm/serving/process.py) loads the model, and takes connections from the same socket. If one ends, its requests fail,
and another one takes its place. Connections that wait are in the socket, and go to the others.

One decision moves all processes: this process looks at the alias, and asks the processes one after another to load the
version. The first one decides whether the version is refused.

This process and each of the others exchange messages, one JSON object in a line:
- to a process: first what it serves, then `move` with a version;
- from a process: `ready` with its version, `failed`, `wake` after a webhook, and `moved` or `reason` after `move`.

Not covered: shared weights, and shared beginnings of prompts. Each process has its own.
"""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import prometheus_client
from prometheus_client import multiprocess

from slm.base import console, environment, model_uri, stopping
from slm.base.errors import BadInput, Unavailable
from slm.base.parameters import Parameters
from slm.serving import batching, server, versions
from slm.tracking import mlflow_client, trace_store

ROOT = str(Path(__file__).resolve().parents[2])  # where slm/ is
MOST_PAUSE = 60.0  # seconds before another try to start a process in the place of one that could not load the model
AFTER_DRAIN = 25.0  # more than stopping.GRACE, after which a process ends itself


def check(workers: int) -> None:
    """
    Raises:
        BadInput: this machine can't run so many processes.
    """
    if workers > 1 and sys.platform == "win32":
        raise BadInput(f"workers: {workers} processes can't share a port on Windows; write 1")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > max(cores, 1):
        raise BadInput(f"workers: {workers} processes are more than the {cores} cores here; write {cores} or less")


def run(args: Parameters, listener: socket.socket) -> None:
    """Serves with `args.workers` processes.

    Raises:
        BadInput: the model can't be served, or the memory does not hold so many.
        Unavailable: the model could not be fetched.
        stopping.Stopped: a signal came, and all processes have ended.
    """
    with _shared_metrics(), listener:
        processes = Processes(args, listener)
        stopping.allow(args.drain + AFTER_DRAIN)
        try:
            with console.step(f"Loading {args.model_uri} in {args.workers} processes"):
                names = processes.start()
            server.tell(args, names)
            threading.Event().wait()
        finally:
            listener.close()
            processes.stop(args.drain + AFTER_DRAIN)


@contextmanager
def _shared_metrics() -> Iterator[None]:
    """A folder through which the processes share what they count."""
    values = prometheus_client.values
    before = values.ValueClass
    with (
        tempfile.TemporaryDirectory(prefix="serve-metrics-") as folder,
        environment.variables({batching.SHARED: folder}),
    ):
        values.ValueClass = values.get_value_class()  # it may have been imported without the variable
        try:
            yield
        finally:
            values.ValueClass = before


class Channel:
    """The messages between this process and another one."""

    def __init__(self, connection: socket.socket):
        self._connection, self._lines = connection, connection.makefile("r", encoding="utf-8")
        self._sending = threading.Lock()

    def send(self, **message: Any) -> None:
        with self._sending, suppress(OSError):  # who is gone can't be told
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def __iter__(self) -> Iterator[dict]:
        """The messages, until the other process has ended."""
        with suppress(OSError, ValueError):
            for line in self._lines:
                yield json.loads(line)


class Processes:
    """All processes. The follower takes them in the place of one process's `versions.Served`."""

    def __init__(self, args: Parameters, listener: socket.socket):
        self.args, self.listener = args, listener
        self.metrics = batching.Metrics()
        self.replaced = prometheus_client.Counter(
            "slm_replaced_processes", "Processes that ended, and were replaced", registry=self.metrics.registry
        )
        self.version = ""  # name/version
        self.ending = threading.Event()
        self.experiment_id = trace_store.experiment_id(args.trace_experiment) if args.traces else ""
        active = mlflow_client.quiet_mlflow().active_run()
        self.run_id = active.info.run_id if active else ""
        follows = server.followed(args)
        self.follower = _Follower(cast(Any, self), follows) if follows else None
        self._members = [_Member(self, number) for number in range(1, args.workers + 1)]

    def start(self) -> tuple[str, ...]:
        """Starts all. The first one says which version they load. Returns the names of the model.

        Raises:
            BadInput, Unavailable: the model can't be served.
        """
        first, *others = self._members
        first.thread.start()
        first.wait()
        self.version = first.version
        for member in others:
            member.thread.start()
        for member in others:
            member.wait()
        if self.follower:
            self.follower.start()
        return first.names

    def stop(self, seconds: float) -> None:
        """Ends all processes: by SIGTERM, and after `seconds` by SIGKILL."""
        until = time.monotonic() + seconds
        self.ending.set()
        if self.follower:
            self.follower.stop()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for member in self._members:
                member.send_signal(number)
            for member in self._members:
                if member.thread.is_alive():
                    member.thread.join(max(0.0, until - time.monotonic()))
            until = time.monotonic() + 5

    def orders(self, first: bool) -> dict[str, Any]:
        """What a new process serves."""
        alias = model_uri.registered_alias(self.args.model_uri)
        return {
            "args": vars(self.args),
            "version": self.version.rpartition("/")[2] if alias else "",
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "processes": self.args.workers if first and not self.version else 1,
        }

    def serves(self, version: str) -> bool:
        return all(one == version for one in [self.version, *(member.version for member in self._ready())])

    def is_ready(self) -> bool:
        return True  # a process that isn't ready after a failed move ends, and is replaced

    def move(self, version: str) -> float:
        """Moves one process after another. Returns the most seconds for which requests of a process waited.

        Raises:
            BadInput: the first one refuses the version.
            Unavailable: the version can't be loaded yet, or some processes have moved and others have not.
        """
        name, waited, moved = f"{self.version.rpartition('/')[0]}/{version}", 0.0, False
        for member in self._ready():
            if member.version != name:
                told = member.ask(version)
                if "moved" not in told:
                    error = BadInput if told["refused"] and not moved else Unavailable
                    raise error(told["reason"])
                member.version, waited = name, max(waited, told["moved"])
            moved = True
        if not moved:
            raise Unavailable("no process is ready")
        self.version = name
        return waited

    def _ready(self) -> list["_Member"]:
        return [member for member in self._members if member.ready.is_set()]


class _Follower(versions.Follower):
    """Looks at the alias for all processes."""

    served: Any

    def move(self, version: str) -> float:
        return self.served.move(version)


class _Member:
    """One process, and those that take its place. A thread hears what it says."""

    def __init__(self, all_processes: Processes, number: int):
        self.all, self.number = all_processes, number
        self.version, self.names = "", ()
        self.ready = threading.Event()
        self.thread = threading.Thread(target=self._tend, name=f"process {number}", daemon=True)
        self.was_ready = False
        self._begun = threading.Event()
        self._error: Exception | None = None
        self._answers: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self._process: subprocess.Popen | None = None
        self._channel: Channel

    def wait(self) -> None:
        """Until the process answers. Raises why it can't."""
        self._begun.wait()
        if self._error:
            raise self._error

    def ask(self, version: str) -> dict:
        """Lets the process move to a version, and returns what it says to that."""
        while not self._answers.empty():
            self._answers.get()
        ended = {"refused": False, "reason": f"process {self.number} of serve has ended"}
        if not self.ready.is_set():
            return ended
        self._channel.send(move=version)
        return self._answers.get() or ended

    def send_signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)  # does nothing if it has ended

    def _tend(self) -> None:
        pause = 1.0
        while not self.all.ending.is_set():
            failed = self._serve()
            if self.all.ending.is_set():
                return
            if not self._begun.is_set():  # the server has not started yet
                self._error = failed
                self._begun.set()
                return
            if self.was_ready:
                self.all.replaced.inc()
                console.err.print(f"warning: {failed}; another process takes its place", markup=False)
                pause = 1.0
            else:
                console.err.print(f"warning: {failed}; the next try is in {pause:g} s", markup=False)
                self.all.ending.wait(pause)
                pause = min(2 * pause, MOST_PAUSE)

    def _serve(self) -> Exception:
        """Runs one process to its end. Returns why it ended."""
        here, there = socket.socketpair()
        variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_RUN_ID"}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, variables.get("PYTHONPATH", "")]))
        descriptors = there.fileno(), self.all.listener.fileno()
        command = [sys.executable, "-m", "slm.serving.process", *map(str, descriptors)]
        # Ctrl-C reaches this process alone
        process = subprocess.Popen(command, env=variables, pass_fds=descriptors, start_new_session=True)
        self._process = process
        there.close()
        self.was_ready, failed = False, None
        with here:
            self._channel = Channel(here)
            self._channel.send(**self.all.orders(first=self.number == 1))
            if self.all.ending.is_set():
                process.terminate()
            for told in self._channel:
                if "ready" in told:
                    self.version, self.names, self.was_ready = told["ready"], tuple(told["names"]), True
                    self.ready.set()
                    self._begun.set()
                elif "failed" in told:
                    failed = (BadInput if told["mistake"] else Unavailable)(told["failed"])
                elif "wake" in told:
                    if self.all.follower:
                        self.all.follower.wake()
                else:
                    self._answers.put(told)
            self.ready.clear()
            self._answers.put({})
        code = process.wait()
        multiprocess.mark_process_dead(process.pid)
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return failed or Unavailable(f"process {self.number} of serve (pid {process.pid}) has ended with {how}")
