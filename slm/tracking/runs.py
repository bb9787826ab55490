"""The life of runs: each run names its process, and the next start ends the runs whose process is gone.

kill -9, full memory and a power cut leave a run RUNNING forever. So each running run has two tags. `process` names the
run's process. `process.seen` is the time of its last heartbeat, and is renewed while the process lives. If the process
belongs to the same machine and the same boot, this module looks for the process itself. For any other process, only the
time since the last heartbeat counts. A run whose process lives is never ended. If the system does not say whether a
process lives, the process counts as alive.

Not covered: a process on another machine that is stopped or cut off for longer than SILENT. The process counts as
gone. If the process continues, it ends its run as usual.
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

from slm.tracking import tags

BEAT = 300  # seconds between two heartbeats
SILENT = 3600  # seconds without a heartbeat after which a process on another machine counts as gone
UNSTARTED = 24 * 3600  # seconds from `mlflow run`'s new run to our process. It builds an environment in between


@dataclass(frozen=True)
class Process:
    host: str
    boot: str  # the boot and the PID namespace, because a PID is unique only there; "" if unknown
    pid: int
    start: int  # clock ticks since the boot. The system reuses a PID, but not the pair of both


def this_process() -> Process:
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        boot += f" {Path('/proc/self/ns/pid').readlink()}"
    return Process(socket.gethostname(), boot, os.getpid(), (_stat(os.getpid()) or ("", 0))[1])


def process_tags() -> dict[str, str]:
    """The tags that name this process in its runs."""
    return {tags.PROCESS: json.dumps(asdict(this_process())), tags.SEEN: _iso(_now())}


def forget_process(client, run_id: str) -> None:
    """Removes the tags of `process_tags` from a run that has ended. Only a running run needs them."""
    for name in (tags.PROCESS, tags.SEEN):
        client.delete_tag(run_id, name)


@contextmanager
def signs_of_life(client, run_id: str) -> Iterator[None]:
    """Renews a run's `process.seen` every BEAT seconds during the block. After a failure, the next beat tries again."""
    over = threading.Event()

    def beat():
        while not over.wait(BEAT):
            with suppress(Exception):
                client.set_tag(run_id, tags.SEEN, _iso(_now()))

    threading.Thread(target=beat, name="signs of life", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def end_abandoned(client, own) -> list[str]:
    """Sets abandoned RUNNING runs in the experiment of the run `own` to FAILED. Returns the ids of these runs.

    One search finds the runs. Each run is read again before it is ended, because it may have ended meanwhile.
    """
    running = client.search_runs([own.info.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    here, ended = this_process(), []
    for run_id, reason, seen in abandoned(running, own, here, _now()):
        with suppress(Exception):  # another user's run, which this user may not be allowed to end
            found = client.get_run(run_id)
            if found.info.status != "RUNNING" or _seen(found) > seen:
                continue
            if tags.ERROR not in found.data.tags:
                client.set_tag(run_id, tags.ERROR, reason)
            client.set_terminated(run_id, "FAILED", end_time=int(seen * 1000))
            ended.append(run_id)
    return ended


def abandoned(running, own, here: Process, now: float) -> list[tuple[str, str, float]]:
    """The RUNNING runs whose process is gone: (run id, reason, last heartbeat in seconds since 1970)."""
    signs: dict[Process, float] = {}  # by process: a heartbeat of the parent run counts for its child runs too
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
    """The process that a run's tag names. None if the run has no valid `process` tag."""
    try:
        process = Process(**json.loads(run.data.tags[tags.PROCESS]))
    except (KeyError, TypeError, ValueError):
        return None
    kinds = [type(value) for value in asdict(process).values()]
    return process if kinds == [str, str, int, int] else None


def gone(process: Process, here: Process, silence: float) -> str:
    """The reason why a process counts as gone; "" if it does not. `silence` is in seconds since its last heartbeat."""
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
        pass  # the process belongs to another user, or the number is no PID
    found = _stat(process.pid)
    return found is None or (found[0] not in "ZX" and found[1] == process.start)


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start of a process, from /proc. None if /proc can't be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold any character
    return fields[0], int(fields[19])


def _never_came(run, own, now: float) -> bool:
    """Whether `mlflow run` made this run for this project, and ended before it started the entry point."""
    ours, theirs = own.data.tags, run.data.tags
    source = "mlflow.source.name"
    waits = "mlflow.project.entryPoint" in theirs and tags.PROCESS not in theirs
    same = waits and theirs.get(source) == ours.get(source)
    return same and now - run.info.start_time / 1000 > UNSTARTED


def _seen(run) -> float:
    try:
        return datetime.datetime.fromisoformat(run.data.tags[tags.SEEN]).timestamp()
    except (KeyError, ValueError):
        return run.info.start_time / 1000


def _now() -> float:
    return datetime.datetime.now(datetime.UTC).timestamp()


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
