"""Tracking stores: sqlite files, and a PostgreSQL on loopback."""

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

from support.commands import free_port


@cache
def _tables() -> bytes:
    """A sqlite file with MLflow's tables, which take seconds to make, and nothing in them."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mlflow.db")
        SqlAlchemyStore(f"sqlite:///{file}", folder)
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("DELETE FROM experiments")  # its artifacts lie where a store is first opened
        return file.read_bytes()


def sqlite_store(folder: Path) -> str:
    """The URI of a new tracking store in `folder`, whose tables are there already."""
    (folder / "mlflow.db").write_bytes(_tables())
    return f"sqlite:///{folder}/mlflow.db"


@contextmanager
def stopped_after(command: list, number: int, **options):
    """A server process, sent a signal at the end and waited for."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen([str(word) for word in command], **(quiet | options))
    try:
        yield process
    finally:
        process.send_signal(number)
        process.wait(30)


def until(answers, process, seconds=60):
    """Waits until `answers()` is true, for `seconds` at most."""
    for _ in range(10 * seconds):
        if answers():
            return
        assert process.poll() is None, "the server ended"
        time.sleep(0.1)
    raise AssertionError(f"no answer in {seconds} s")


@contextmanager
def database():
    """A PostgreSQL, not started; gives the URI of an empty database, and what runs it while a block lasts."""
    found = shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    assert found, "no PostgreSQL: install Debian's postgresql, or put its initdb on PATH"
    binaries = Path(found).resolve().parent
    account = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="phi3-mlflow-postgresql-"))  # pytest's own can't be entered by others
    if account:
        shutil.chown(folder, "postgres", "postgres")
    data, port = folder / "data", free_port()

    @contextmanager
    def running():
        command = [binaries / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", folder, "-F"]
        with stopped_after(command, signal.SIGINT, cwd=folder, **account) as process:
            ready = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
            until(lambda: subprocess.run(ready, capture_output=True).returncode == 0, process)
            yield

    try:
        initdb = [binaries / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([str(word) for word in initdb], check=True, capture_output=True, cwd=folder, **account)
        yield f"postgresql://mlflow@127.0.0.1:{port}/postgres", running
    finally:
        shutil.rmtree(folder)
