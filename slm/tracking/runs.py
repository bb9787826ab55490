"""The life of runs: each says which process it belongs to, and the next start ends those whose process is gone.

kill -9, a full memory and a power cut leave a run RUNNING for ever. So a run's tags hold its process (`process`) and
when that was last alive (`process.seen`, renewed while it lives). On the same machine, since the same boot, the process
itself is looked for; of any other only silence tells. A run whose process lives is never ended: where the system won't
say, the process lives.

Not covered: a run whose process was stopped or cut off for longer than SILENT on another machine is taken for gone;
where it goes on, it ends its run as it would have.
"""

import datetime
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

PROCESS, SEEN = "process", "process.seen"
BEAT = 300  # seconds between two signs of life
SILENT = 3600  # seconds after which a process elsewhere is taken for gone
UNSTARTED = 24 * 3600  # seconds that `mlflow run` has, from its run to our process: it builds an environment in between


@dataclass(frozen=True)
class Process:
    host: str
    boot: str  # the machine's boot and the PID namespace, outside of which a PID means nothing; "" where unknown
    pid: int
    start: int  # clock ticks since the boot: a PID is given again, the pair is not


def this_process() -> Process:
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        boot += f" {Path('/proc/self/ns/pid').readlink()}"
    return Process(socket.gethostname(), boot, os.getpid(), (_stat(os.getpid()) or ("", 0))[1])


def tags() -> dict[str, str]:
    """What a run of this process is marked with."""
    return {PROCESS: json.dumps(asdict(this_process())), SEEN: _iso(_now())}


@contextmanager
def signs_of_life(client, run_id: str) -> Iterator[None]:
    """Renews a run's `process.seen` while the block goes on; a store that doesn't answer is asked again next time."""
    over = threading.Event()

    def beat():
        while not over.wait(BEAT):
            with suppress(Exception):
                client.set_tag(run_id, SEEN, _iso(_now()))

    threading.Thread(target=beat, name="signs of life", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def end_abandoned(client, own) -> list[str]:
    """Sets FAILED what earlier processes left RUNNING in the experiment of the run `own`; gives those runs' ids.

    One search, and for a run that is to be ended one more look, since it may have ended in the meantime.
    """
    running = client.search_runs([own.info.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    here, ended = this_process(), []
    for run_id, reason, seen in abandoned(running, own, here, _now()):
        with suppress(Exception):  # another user's run, which may not be ours to end
            found = client.get_run(run_id)
            if found.info.status != "RUNNING" or _seen(found) > seen:
                continue
            if "error" not in found.data.tags:
                client.set_tag(run_id, "error", reason)
            client.set_terminated(run_id, "FAILED", end_time=int(seen * 1000))
            ended.append(run_id)
    return ended


def abandoned(running, own, here: Process, now: float) -> list[tuple[str, str, float]]:
    """Those of the RUNNING runs whose process is gone: (run id, reason, last sign of life in seconds since 1970)."""
    signs: dict[Process, float] = {}  # by process: a child is alive while its parent gives signs
    for run in running:
        process = process_of(run)
        if process:
            signs[process] = max(signs.get(process, 0), _seen(run))
    found = []
    for run in running:
        process = process_of(run)
        if process:
            reason = gone(process, here, now - signs[process])
            if reason:
                found.append((run.info.run_id, reason, signs[process]))
        elif run.info.run_id != own.info.run_id and _never_came(run, own, now):
            reason = f"mlflow run made this run over {UNSTARTED // 3600} h ago, and its entry point never started"
            found.append((run.info.run_id, reason, _seen(run)))
    return found


def process_of(run) -> Process | None:
    """The process that a run's tag names; None for a run that is not ours."""
    try:
        process = Process(**json.loads(run.data.tags[PROCESS]))
    except (KeyError, TypeError, ValueError):
        return None
    kinds = [type(value) for value in asdict(process).values()]
    return process if kinds == [str, str, int, int] else None


def gone(process: Process, here: Process, silence: float) -> str:
    """Why a process is taken for gone; "" where it is not. `silence` is in seconds since its last sign of life."""
    ended = f"its process ended without a word (kill -9, out of memory, power): {process.pid} on {process.host}"
    if here.boot and (process.host, process.boot) == (here.host, here.boot):
        return "" if _lives(process) else ended
    return f"{ended}, no sign of life for {silence / 3600:.1f} h" if silence > SILENT else ""


def _lives(process: Process) -> bool:
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's, or no PID at all
    found = _stat(process.pid)
    return found is None or (found[0] not in "ZX" and found[1] == process.start)


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start of a process, from /proc; None where that can't be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return fields[0], int(fields[19])


def _never_came(run, own, now: float) -> bool:
    """Whether a run is of this project, and `mlflow run` died between making it and starting the entry point."""
    ours, theirs = own.data.tags, run.data.tags
    source = "mlflow.source.name"
    same = "mlflow.project.entryPoint" in theirs and PROCESS not in theirs and theirs.get(source) == ours.get(source)
    return same and now - run.info.start_time / 1000 > UNSTARTED


def _seen(run) -> float:
    try:
        return datetime.datetime.fromisoformat(run.data.tags[SEEN]).timestamp()
    except (KeyError, ValueError):
        return run.info.start_time / 1000


def _now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
