"""Downloads a prompt set from a URI into a temporary file. Bytes and seconds are limited.

A server may send without end, announce a wrong size, or send very slowly. MLflow's artifact repositories
(mlflow-artifacts, runs, models, s3, …) have no limits, and their threads can't be stopped. So each download runs in a
child process. The system limits the size of the child's files (RLIMIT_FSIZE). This process watches the folder and the
time. It kills the child at a limit. MLflow treats a plain web address as an artifact store. So the child reads web
addresses with requests instead.

Not covered: models. slm/tracking/registry.py downloads models, without a limit on their size. Also not covered: `file:`
URIs, and what the server learns from the request.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from slm.base import console, environment
from slm.base.errors import BadInput, Unavailable, exhausted
from slm.base.wording import one_line, quoted
from slm.models import checkpoints
from slm.prompts.readers import FILE_BYTES
from slm.tracking import live_prompts, mlflow_client

URI_SCHEMES = ("runs:/", "models:/", "mlflow-artifacts:/", *live_prompts.SCHEMES)
SECONDS = 600
REDIRECTS = 5
POLL = 0.05  # seconds between two looks at the folder
TIMEOUTS = (10, 60)  # seconds for the connection to a web server, and between two of its bytes
TOO_LARGE = "too large"
ROOM = 4 * 2**30  # bytes of memory, MLflow's libraries among them


def is_address(given: str) -> bool:
    """Whether a prompt set is named by a URI, and not by a path."""
    return "://" in given or given.startswith(URI_SCHEMES)


@contextmanager
def named_file(parameter: str, given: str) -> Iterator[Path]:
    """The file that the value of a parameter names: a path in the repository, any path, or an address.

    Raises:
        BadInput: there is no such file.
        Unavailable: the server that has the file fails.
    """
    if live_prompts.is_live(given):
        raise BadInput(f"{parameter}: {quoted(given)} is a prompt set, which `prompts` takes; name a file")
    if is_address(given):
        with file(given) as path:
            yield path
    else:
        yield checkpoints.existing(parameter, given)


@contextmanager
def file(uri: str, limit: int = FILE_BYTES, seconds: float = SECONDS) -> Iterator[Path]:
    """The file that a URI names. The copy is removed at the end of the block. A `file:` URI gives the file itself.

    Raises:
        BadInput: the file does not exist, or has more than `limit` bytes.
        Unavailable: the server fails, or the download takes more than `seconds`.
    """
    if uri.startswith("file:"):
        yield mlflow_client.download(uri)
        return
    if uri.startswith(live_prompts.TRACES):
        live_prompts.read(uri)
    with tempfile.TemporaryDirectory(prefix="phi3-mlflow-") as scratch:
        yield _downloaded(uri, Path(scratch), limit, seconds)


def _downloaded(uri: str, scratch: Path, limit: int, seconds: float) -> Path:
    mlflow = mlflow_client.quiet_mlflow()
    variables = {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(environment.REPOSITORY), os.environ.get("PYTHONPATH")])),
        "TMPDIR": str(scratch),
    }
    # -P: the working folder may hold another slm. The child sees from the closed pipe that this process has ended.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "slm.tracking.downloads", uri, str(scratch), str(limit)],
        env=os.environ | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        said = _watched(process, scratch, limit, time.monotonic() + seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    if said.get("error") == TOO_LARGE:
        raise BadInput(f"{uri}: is larger than {limit // 2**20} MiB; split it")
    if "error" in said:
        raise (Unavailable if said["unavailable"] else BadInput)(f"{uri} can't be downloaded: {said['error']}")
    if "told" in said:
        console.out.print(f"{Path(said['path']).stem}: {said['told']}", markup=False)
    return Path(said["path"])


def _watched(process: subprocess.Popen, scratch: Path, limit: int, end: float) -> dict:
    """The child's last message, or the reason why the child must be killed."""
    while process.poll() is None:
        if _size(scratch) > limit:
            return {"error": TOO_LARGE}
        if time.monotonic() > end:
            return {"error": "it takes too long; try again, or download the file yourself", "unavailable": True}
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL)
    assert process.stdout is not None  # a pipe
    lines = process.stdout.read().decode(errors="replace").splitlines()
    if _size(scratch) > limit:
        return {"error": TOO_LARGE}
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        return {"error": f"the download process ended with exit code {process.returncode}", "unavailable": True}


def _size(folder: Path) -> int:
    """The bytes of all files below a folder. A file that disappears meanwhile counts as 0 bytes."""
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            size += path.lstat().st_size
    return size


# ---------------------------------------------------------------------------------------------------------------------
# In the child process


def main(uri: str, folder: str, limit: str) -> None:
    """Downloads the file, and prints one line of JSON: `path`, or `error` and `unavailable` (the server failed).

    With `path`, a prompt set that goes on changing has `told`: what its rows are of.
    """
    import threading

    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _limit_files(int(limit))
    try:
        if live_prompts.is_live(uri):
            path, told = live_prompts.written(uri, Path(folder))
            print(json.dumps({"path": str(path), "told": told}))
        else:
            print(json.dumps({"path": _fetched(uri, Path(folder))}))
    except Exception as error:
        text = one_line(error)
        ours = isinstance(error, Unavailable) or mlflow_client.is_infrastructure(error)
        reason = exhausted(error)
        print(json.dumps({"error": reason or text, "unavailable": bool(reason) or ours}))


def _end_with_the_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _limit_files(limit: int) -> None:
    """Makes the system send SIGXFSZ when a file of this process exceeds the limit. The handler ends the process."""
    with suppress(ImportError, ValueError, OSError):  # Windows; or a limit that is lower already
        import resource

        signal.signal(signal.SIGXFSZ, _say_too_large)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        resource.setrlimit(resource.RLIMIT_AS, (ROOM, ROOM))  # an endless answer may fill the memory instead of a file


def _say_too_large(number, frame) -> None:
    print(json.dumps({"error": TOO_LARGE}), flush=True)
    os._exit(0)


def _fetched(uri: str, folder: Path) -> str:
    if re.match(r"https?://", uri, re.IGNORECASE) and not _is_artifact(uri):
        return _from_the_web(uri, folder)
    mlflow = mlflow_client.quiet_mlflow()
    return mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))


def _is_artifact(uri: str) -> bool:
    """Whether a web address is an artifact of the tracking server. MLflow sends that server's credentials along."""
    if "/mlflow-artifacts/artifacts/" not in uri:
        return False
    return urlsplit(uri)[:2] == urlsplit(mlflow_client.quiet_mlflow().get_tracking_uri())[:2]


def _from_the_web(uri: str, folder: Path) -> str:
    """Downloads from a web address. The file keeps its name, because the suffix of the name tells the format."""
    import requests

    name = PurePosixPath(unquote(urlsplit(uri).path).replace("\\", "/")).name.replace("\0", "")[-100:]
    path = folder / (name if name not in ("", "..") else "prompts")
    with requests.Session() as session:
        session.max_redirects = REDIRECTS
        try:
            answer = session.get(uri, stream=True, timeout=TIMEOUTS, headers={"Accept-Encoding": "identity"})
        except requests.TooManyRedirects:
            raise BadInput(f"it redirects more than {REDIRECTS} times") from None
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            raise BadInput(f"it redirects to something other than a web address: {error}") from None
        with answer:
            steps = [step.url for step in (*answer.history, answer)]
            if any(one.startswith("https:") and other.startswith("http:") for one, other in itertools.pairwise(steps)):
                raise BadInput(f"it redirects from https to http, to {steps[-1]}")
            if answer.status_code != 200:
                line = f"the server answers {answer.status_code} {answer.reason}"
                server = answer.status_code in (408, 429) or answer.status_code >= 500
                raise (Unavailable if server else BadInput)(line)
            with path.open("xb") as file:
                for part in answer.iter_content(2**16):
                    file.write(part)
    return str(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
